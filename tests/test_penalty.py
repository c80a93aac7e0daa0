"""GradientPenalty: the promised calls, one forward, no traces, and refusals that teach."""

import copy
import math
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import B, gradients, images, relative_error
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import gpkit


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mlp(outputs=1, act=nn.Tanh, **dropout):
    hidden = [act(), *[nn.Dropout(p) for p in dropout.values()]]
    return nn.Sequential(nn.Linear(3, 4), *hidden, nn.Linear(4, outputs)).double()


def data(*shape):
    return torch.randn(B, *(shape or (3,)), dtype=torch.float64)


def backward(value, net):
    """Return the gradients that a training step would see."""
    net.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


# The contract, as it is written in the README.


def test_weight_penalty_in_a_training_loop():
    net, x, y = mlp(3), data(), torch.arange(B) % 3
    penalty = gpkit.weight_grad_norm(weight=0.1)
    loss = F.cross_entropy(net(x), y)
    total = loss + penalty(loss, net.parameters())
    found = backward(total, net)

    def closure():
        return F.cross_entropy(net(x), y)

    again = backward(closure() + penalty(closure, net), net)

    def true(params):
        def risk(p):
            return F.cross_entropy(torch.func.functional_call(net, p, (x,)), y)

        return risk(params) + 0.1 * oracles.weight_norm(risk, params).square().sum()

    grads, value = torch.func.grad_and_value(true)(dict(net.named_parameters()))
    true = torch.cat([g.flatten() for g in grads.values()])
    assert relative_error(total, value) < 1e-12
    assert relative_error(found, true) < 1e-12
    assert relative_error(again, true) < 1e-12


def test_input_penalty_in_a_training_loop():
    net, x, y = mlp(3), data(), torch.arange(B) % 3
    penalty = gpkit.input_grad_norm(weight=1.0)
    x.requires_grad_(True)
    losses = F.cross_entropy(net(x), y, reduction="none")
    (losses.mean() + penalty(losses, x)).backward()

    def true(params):
        def risk(x, y):
            output = torch.func.functional_call(net, params, (x[None],))
            return F.cross_entropy(output, y[None])

        risks = torch.func.vmap(risk)(x.detach(), y)
        return risks.mean() + oracles.input_norms(risk, 1, x.detach(), y).square().mean()

    grads = torch.func.grad(true)(dict(net.named_parameters()))
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


def test_critic_calls():
    critic, real, fake = mlp(), data(), data()
    penalty = gpkit.wgan_gp(weight=10.0)
    assert penalty(critic, real=real, fake=fake).shape == ()
    gpkit.r1(weight=10.0)(critic, real=real)
    gpkit.r2(weight=10.0)(critic, fake=fake)
    gpkit.input_grad_norm(weight=1.0)(critic, real)
    terms = penalty.terms(critic, real=real, fake=fake)
    assert terms.norms.shape == terms.values.shape == (B,)
    assert terms.penalty.shape == ()


def test_all_axes_together():
    critic, real, fake = mlp(), data(), data()
    penalty = gpkit.GradientPenalty(
        of="output", wrt="input", order=2, form=gpkit.two_sided(1.0), at=gpkit.interpolate(),
        estimator=gpkit.projection(4), weight=10.0, every=16,
    )  # fmt: skip
    value = penalty(critic, real=real, fake=fake)
    assert value > 0
    assert value.requires_grad
    assert penalty(critic, real=real, fake=fake) == 0


# Known answers.


def test_linear_map():
    A = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = gpkit.jacobian(weight=1.0, estimator="exact")(lambda x: x @ A.T + 1, data())
    torch.testing.assert_close(value, A.square().sum() / 2)
    torch.testing.assert_close(torch.autograd.grad(value, A)[0], A.detach())


def test_linear_regression():
    X, t = data(), data(1).squeeze(1)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value = gpkit.weight_grad_norm(weight=1.0)(lambda: (X @ w - t).square() / 2, [w])
    norm, gradient = oracles.regression(X, t, w.detach())
    torch.testing.assert_close(value, norm)
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], gradient)


def test_one_hidden_relu_layer_is_not_trained_through_itself():
    # f = w₂ᵀ relu(W₁x): ∂f/∂W₁ does not depend on W₁; catches a stale .grad and a wrong graph
    net = mlp(act=nn.ReLU)
    net(data()).sum().backward()
    stale = net[0].weight.grad.clone()
    penalty = gpkit.weight_grad_norm(weight=1.0, match="0.weight")
    x = data()
    value = penalty(lambda: net(x).mean(), net)
    w1, w2 = torch.autograd.grad(value, [net[0].weight, net[2].weight], materialize_grads=True)
    assert torch.equal(w1, torch.zeros_like(w1))
    assert w2.any()
    assert torch.equal(net[0].weight.grad, stale)


@pytest.mark.parametrize(("gamma", "distance"), [(0.0, 3.10), (0.3, 2.6e-6), (1.0, 9.5e-22)])
def test_dirac_gan(gamma, distance):
    # D(x) = ψx, real at 0, fake at θ: without a penalty simultaneous descent leaves (0, 0)
    theta, psi = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    penalty, real = gpkit.r1(weight=gamma), torch.zeros(1, dtype=torch.float64)

    def critic(x):
        return psi * x

    for _ in range(500):
        loss = F.softplus(-psi * theta)  # the critic's; the generator's is its negative
        regular = loss + penalty(critic, real=real)
        (down,) = torch.autograd.grad(regular, psi, retain_graph=True)
        (up,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            psi -= 0.2 * down
            theta += 0.2 * up
    assert math.hypot(psi.item(), theta.item()) == pytest.approx(distance, rel=0.02)


# Groups: what is averaged before the norm is taken.


def test_scopes():
    # catches a scope that is ignored: mean ‖g_i‖² is not ‖mean g_i‖²
    net, x = mlp(), data()
    batch = gpkit.weight_grad_norm(weight=1.0)
    sample = gpkit.weight_grad_norm(weight=1.0, scope="sample")
    each = [batch(net(x[i : i + 1]).square(), net) for i in range(B)]
    assert relative_error(sample(net(x).square(), net), sum(each) / B) < 1e-12
    assert batch(net(x).square(), net) < 0.99 * sample(net(x).square(), net)
    mean = batch(net(x).square().mean(), net)
    assert relative_error(batch(net(x).square(), net), mean) < 1e-12


def test_weight_of_several_outputs_is_the_jacobian():
    net, x = mlp(2), data()
    value = gpkit.weight_grad_norm(weight=1.0, of="output")(net(x), net)
    parts = [gpkit.weight_grad_norm(weight=1.0)(net(x)[:, i].mean(), net) for i in range(2)]
    assert relative_error(value, sum(parts)) < 1e-12


def test_selected_output():
    net, x = mlp(2), data()
    penalty = gpkit.r1(weight=1.0, of=lambda out: out["logits"][:, 0])
    value = penalty(lambda x: {"logits": net(x)}, real=x)
    assert relative_error(value, gpkit.r1(weight=1.0)(lambda x: net(x)[:, 0], real=x)) < 1e-12


def test_several_inputs_have_one_norm():
    net, x = mlp(), data()
    a, b = x[:, :1].clone(), x[:, 1:].clone()
    whole = gpkit.eikonal(weight=1.0)(net, x)
    parts = gpkit.eikonal(weight=1.0)(lambda a, b: net(torch.cat([a, b], 1)), (a, b))
    assert relative_error(parts, whole) < 1e-12
    a.requires_grad_(), b.requires_grad_()
    graph = gpkit.eikonal(weight=1.0)(net(torch.cat([a, b], 1)), (a, b))
    assert relative_error(graph, whole) < 1e-12


# Modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_a_value(mode):
    net, x = mlp(), data()
    training = gpkit.r1()(net, real=x)
    with mode():
        inside = data()
        value = gpkit.r1()(net, real=x)
        terms = gpkit.r1().terms(net, real=x)
        gpkit.r1()(net, real=inside)
        loss = gpkit.weight_grad_norm()(lambda: net(x).square().mean(), net)
    assert relative_error(value, training) < 1e-12
    tensors = value, terms.norms, terms.values, terms.penalty, loss
    assert not any(t.requires_grad for t in tensors)
    assert all(t.isfinite().all() for t in tensors)


def test_terms_can_be_trained_on():
    net, x = mlp(), data()
    terms = gpkit.eikonal(weight=2.0).terms(net, x)
    custom = 2.0 * (terms.norms - 1).square().mean()
    true = gpkit.eikonal(weight=2.0)(net, x)
    assert relative_error(gradients(custom, net), gradients(true, net)) < 1e-12


@pytest.mark.parametrize("kind", ["input", "weight"])
@pytest.mark.parametrize("route", ["graph", "callable"])
def test_autocast(kind, route):
    def penalty(net, x):
        if kind == "weight":
            loss = net(x).square().mean() if route == "graph" else lambda: net(x).square().mean()
            return gpkit.weight_grad_norm(weight=1.0)(loss, net)
        z = x.clone().requires_grad_()
        return gpkit.r1(weight=1.0)(net(z).float() if route == "graph" else net, real=z)

    net, x = mlp().float(), data().float()
    true = penalty(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty(net, x)
    assert value.dtype == torch.float32
    assert relative_error(value, true) < 0.05
    assert relative_error(gradients(value, net), gradients(true, net)) < 0.05


def test_autocast_does_not_round_the_backward_of_a_graph_in_float32():
    net, z = mlp().float(), data().float().requires_grad_()
    penalties = gpkit.r1(), gpkit.curvature()
    true = [penalty(net(z), z) for penalty in penalties]
    scores = net(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [penalty(scores, z) for penalty in penalties]
    torch.testing.assert_close(inside, true, rtol=1e-6, atol=0)


def test_dropout_draws_from_a_stream_of_its_own():
    net, x = mlp(p=0.5), data()
    state = torch.get_rng_state()
    penalty = gpkit.r1(seed=1)
    first, second = penalty(net, real=x), penalty(net, real=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert first != second  # a mask of its own at each call
    torch.manual_seed(77)
    assert gpkit.r1(seed=1)(net, real=x) == first  # which the training's numbers do not touch
    torch.manual_seed(0)
    assert gpkit.r1()(net, real=x) != first  # another seed


def test_batch_norm_statistics_move_once_a_step():
    # the training forward moves them; a penalty's own forward does not
    nets = [images(stateful=True).net for _ in range(2)]
    x = images().real
    penalty = gpkit.r1()
    for net, act in zip(nets, (True, False), strict=True):
        net.train()
        loss = net(x).mean()
        if act:
            ways = [net, net.forward, partial(net), lambda x, critic=net: critic(x)]
            loss = loss + sum(penalty(f, real=x) for f in ways)
        loss.backward()
    assert nets[0][1].num_batches_tracked == 1
    assert all(map(torch.equal, nets[0].buffers(), nets[1].buffers()))


def test_buffers_are_given_back_after_an_error():
    net = images(stateful=True).net
    before = [id(b) for b in net.buffers()]
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        gpkit.r1()(lambda x: net(x) * (1 / 0), real=images().real)
    assert [id(b) for b in net.buffers()] == before
    assert net[1].num_batches_tracked == 0


def test_randomness_is_a_function_of_seed_and_count():
    net, x = mlp(10), data()
    one, two, other = (gpkit.jacobian(seed=seed) for seed in (3, 3, 4))
    draws = [penalty(net, x).item() for penalty in (one, two, other) for _ in range(3)]
    assert draws[:3] == draws[3:6]
    assert len(set(draws)) == 6


# Attention and checkpointing.


def encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True, **kwargs)
    return layer.double().eval()


def attention():
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    return lambda x: layer(x, x, x, need_weights=False)[0], layer


@pytest.mark.parametrize("kind", ["encoder", "attention"])
def test_attention_has_a_double_backward_by_itself(kind):
    f, layer = (encoder(),) * 2 if kind == "encoder" else attention()
    x = data(3, 4)

    def score(x):
        return f(x).square().sum((1, 2))

    value = gpkit.r1()(score, real=x)
    with sdpa_kernel(SDPBackend.MATH):
        z = x.clone().requires_grad_()
        true = gpkit.r1()(score(z), z)
    assert relative_error(value, true) < 1e-10
    assert relative_error(gradients(value, layer), gradients(true, layer)) < 1e-10
    z = x.clone().requires_grad_()
    for graph in (lambda: gpkit.r1()(score(z), z), lambda: gpkit.curvature()(score(z), z)):
        with pytest.raises(
            RuntimeError, match=r"sdpa_kernel\(SDPBackend.MATH\), or give .* a call"
        ):
            graph()


def test_attention_upstream_of_the_variables_is_no_obstacle():
    f, _ = attention()
    head, x = nn.Linear(4, 1).double(), data(3, 4)
    loss = head(f(x)).square().mean()
    value = gpkit.weight_grad_norm(weight=1.0)(loss, head)
    value.backward()
    assert head.weight.grad.any()


def test_checkpointing():
    net, x = mlp(), data()
    z = x.clone().requires_grad_()

    def run(z, reentrant):
        return checkpoint(net, z, use_reentrant=reentrant)

    value = gpkit.r1()(lambda x: run(x, False), real=x)
    true = gpkit.r1()(net, real=x)
    assert relative_error(value, true) < 1e-12
    assert relative_error(gradients(value, net), gradients(true, net)) < 1e-12
    for act in (
        lambda: gpkit.r1()(lambda x: run(x, True), real=x),
        lambda: gpkit.weight_grad_norm()(run(z, True).square().mean(), net.parameters()),
    ):
        with pytest.raises(RuntimeError, match=r"use checkpoint\(..., use_reentrant=False\)"):
            act()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2


@pytest.mark.parametrize("order", [1, 2])
def test_once_differentiable_function(order):
    # torch takes such a backward for a constant, without a word, where it comes last
    net = mlp()
    with pytest.raises(
        RuntimeError, match=r"CubeBackward: .* write its backward in differentiable"
    ):
        gpkit.curvature(order=order)(lambda x: Cube.apply(net(x)), data())
    h = Cube.apply(net[:2](data()))  # upstream of the variables it does no harm
    gpkit.curvature(order=order)(net[2](h).tanh(), h).backward()


# Refusals.

NET, LINEAR, RELU = mlp(), nn.Linear(3, 1).double(), mlp(act=nn.ReLU)
FROZEN = copy.deepcopy(NET).requires_grad_(False)
X = torch.ones(B, 3, dtype=torch.float64)
Z = X.clone().requires_grad_()


def without_create_graph():
    z = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(NET(z).sum(), z)
    return g.square().sum()


def freed():
    loss = NET(X).square().mean()
    loss.backward()
    return loss


NOTHING = "does not depend on any trained parameter: "
REFUSALS = {
    "scalar loss": (
        lambda: gpkit.input_grad_norm()(NET(Z).mean(), Z),
        ValueError,
        r'one value per sample, \[5\]; got a scalar: a mean hides a factor 1/B.*reduction="none"',
    ),
    "scalar from a callable": (
        lambda: gpkit.r1()(lambda x: NET(x).sum(), real=X),
        ValueError,
        "got a scalar",
    ),
    "logits for losses": (
        lambda: gpkit.input_grad_norm()(mlp(3)(Z), Z),
        ValueError,
        r"one value per sample, \[5\] or \[5, 1\]; got \[5, 3\]: .* gpkit.jacobian for outputs",
    ),
    "another batch": (
        lambda: gpkit.r1()(NET(Z)[:3], real=Z),
        ValueError,
        r"needs values per sample, \[5, ...\]; got \[3, 1\]",
    ),
    "no graph": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean().detach(), NET),
        RuntimeError,
        "nothing to differentiate: .* Was it computed under no_grad, detached",
    ),
    "without create_graph": (
        lambda: gpkit.weight_grad_norm()(without_create_graph, NET),
        RuntimeError,
        "without create_graph=True",
    ),
    "graph is gone": (
        lambda: gpkit.weight_grad_norm()(freed(), NET),
        RuntimeError,
        r"call the penalty before loss.backward\(\)",
    ),
    "forgotten requires_grad": (
        lambda: gpkit.input_grad_norm()(NET(X), X),
        ValueError,
        r"do not require grad; call x.requires_grad_\(\) before the forward",
    ),
    "requires_grad after the forward": (
        lambda: gpkit.input_grad_norm()(NET(X), X.clone().requires_grad_()),
        RuntimeError,
        NOTHING + r".* on the inputs: call x.requires_grad_\(\) before the forward",
    ),
    "weights of another net": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean(), LINEAR),
        RuntimeError,
        NOTHING + ".* on the weights: was it computed from other parameters",
    ),
    "ReLU at order 2": (
        lambda: gpkit.curvature()(RELU, X),
        RuntimeError,
        NOTHING + r"order 2 of a piecewise-linear net \(Relu\) is zero everywhere: .*GELU",
    ),
    "linear at order 2": (
        lambda: gpkit.curvature()(LINEAR, X),
        RuntimeError,
        NOTHING + "the derivative of order 2 does not depend on them. Is the function linear",
    ),
    "linear in its weights": (
        lambda: gpkit.weight_grad_norm()(LINEAR(X).mean(), LINEAR),
        RuntimeError,
        NOTHING + "the derivative of order 1 does not depend on them",
    ),
    "frozen parameters": (
        lambda: gpkit.weight_grad_norm()(lambda: FROZEN(X).mean(), FROZEN),
        ValueError,
        "none of the 4 parameters requires grad: all are frozen",
    ),
    "list of outputs": (
        lambda: gpkit.r1()(lambda x: [NET(x)], real=X),
        TypeError,
        r"must return a tensor; got a list: select one with `of=lambda output: output\[0\]`",
    ),
    "integers": (
        lambda: gpkit.r1()(NET, real=torch.ones(B, 3).long()),
        TypeError,
        "needs floating-point samples; got torch.int64",
    ),
    "tensor, but other points": (
        lambda: gpkit.wgan_gp()(NET(Z), real=Z, fake=Z),
        ValueError,
        r"`at=interpolate\(\)` needs a callable",
    ),
    "samples twice": (
        lambda: gpkit.r1()(NET, X, real=X),
        TypeError,
        "pass the samples once",
    ),
    "no samples": (lambda: gpkit.r1()(NET), TypeError, r"needs samples: .* got none"),
    "samples in a row": (
        lambda: gpkit.r1()(NET, X, X),
        TypeError,
        r"several inputs go into one tuple: .* got 2 arguments after f",
    ),
    "neither tensor nor callable": (lambda: gpkit.r1()(3, X), TypeError, "got a int"),
    "loss that is a number": (
        lambda: gpkit.weight_grad_norm()(0.3, NET),
        TypeError,
        "expected a tensor or a callable; got a float",
    ),
    "no net": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean()),
        TypeError,
        r"penalty\(loss, net.parameters\(\)\); got 0 arguments after the loss",
    ),
    "real in a weight penalty": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean(), NET, real=X),
        TypeError,
        "takes no real= or fake=",
    ),
    "parameters that are none": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean(), ["0.weight"]),
        TypeError,
        "number 0 is a str",
    ),
    "pattern without names": (
        lambda: gpkit.weight_grad_norm(match="0.*")(NET(X).mean(), NET.parameters()),
        TypeError,
        r"`weights\('0.\*'\)` selects by name: pass the module",
    ),
    "pattern that matches nothing": (
        lambda: gpkit.weight_grad_norm(match="0.wieght")(NET(X).mean(), NET),
        ValueError,
        r"matches none of 4 parameters \(did you mean '0.weight'\?\)",
    ),
    "matrix for a loss": (
        lambda: gpkit.weight_grad_norm()(mlp(3)(X), NET),
        ValueError,
        r'of="loss" needs a scalar or losses \[B\]; got \[5, 3\]',
    ),
    "scalar per sample": (
        lambda: gpkit.weight_grad_norm(scope="sample")(NET(X).mean(), NET),
        ValueError,
        r'scope="sample" needs one loss per sample, \[B\]; got a scalar',
    ),
}


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS.values(), ids=REFUSALS)
def test_refuses_a_call(act, error, said):
    with pytest.raises(error, match=said):
        act()


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ({"wrt": "inptu"}, r"`wrt=...` must be one of 'input', 'weight'; .* mean 'input'\?\)"),
        (
            {"of": "lost"},
            r"`of=...` must be one of 'output', 'loss', 'sampled_loss'; got 'lost' \(did .* 'loss'",
        ),
        ({"scope": "samples", "wrt": "weight"}, "'batch', 'sample', .* mean 'sample'"),
        ({"scope": "batch"}, "`scope=...` must be one of 'sample', 'pixel'; got 'batch'"),
        ({"form": "square"}, r"mean 'squared'\?"),
        ({"at": "interpolat"}, r"mean 'interpolate'\?"),
        ({"estimator": "exactly"}, r"mean 'exact'\?"),
        ({"order": 0}, "`order=...` must be an integer >= 1; got 0"),
        ({"order": 1.0}, "`order=...` must be an integer >= 1; got 1.0"),
        ({"order": True}, "`order=...` must be an integer >= 1; got True"),
        ({"seed": -1}, "`seed=...` must be an integer >= 0; got -1"),
        ({"weight": math.nan}, "`weight=...` must be a number >= 0; got nan"),
        ({"weight": math.inf}, "`weight=...` must be a number >= 0; got inf"),
        ({"weight": -1}, "`weight=...` must be a number >= 0; got -1"),
        ({"weight": "0.1"}, "`weight=...` must be a number >= 0; got '0.1'"),
        ({"weight": True}, "`weight=...` must be a number >= 0; got True"),
        ({"weight": None}, "`weight=...` must be a number >= 0; got None"),
    ],
    ids=str,
)
def test_refuses_an_axis(axis, said):
    with pytest.raises(ValueError, match=said):
        gpkit.GradientPenalty(**axis)
    if "wrt" not in axis:
        with pytest.raises(ValueError, match=said):
            gpkit.r1(**axis)


def test_a_frozen_net_has_a_value():
    # nothing is trained, so nothing is refused
    assert gpkit.r1()(FROZEN, real=X) > 0


def test_refuses_what_stops_to_act():
    # not at the first call only
    penalty, net = gpkit.weight_grad_norm(), mlp()
    penalty(net(X).square().mean(), net)
    with pytest.raises(RuntimeError, match="does not depend on any trained parameter"):
        penalty(LINEAR(X).mean(), LINEAR)


def test_frozen_parameters_take_no_part():
    net, x = mlp(), data()
    net[0].requires_grad_(False)
    value = gpkit.weight_grad_norm(weight=1.0)(net(x).square().mean(), net)
    part = gpkit.weight_grad_norm(weight=1.0, match="2.*")(net(x).square().mean(), net)
    assert relative_error(value, part) < 1e-12


def test_nan_is_not_masked():
    net, x = mlp(), data()
    x[0, 0] = math.nan
    for penalty in (gpkit.r1(), gpkit.eikonal(), gpkit.wgan_lp(at="data")):
        assert penalty(net, x).isnan()
        assert penalty.terms(net, x).norms.isnan().tolist() == [True, *[False] * (B - 1)]


def test_repr_names_the_axes():
    said = repr(gpkit.wgan_gp(weight=3.0, every=4))
    for part in ("two_sided(norm='l2', scale=1.0, center=1.0)", "interpolate", "weight=3.0"):
        assert part in said
