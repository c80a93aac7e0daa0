"""Finite differences: the exact penalty as the step shrinks, by first derivatives alone."""

import copy
from functools import partial

import oracles
import pytest
import torch
from cases import gradients, relative_error
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkit
from gpkit.autodiff.known_gradient import perturbed
from gpkit.estimators.curvature_difference import curvature_difference

SIDES = ("forward", "backward", "central")
fd = gpkit.finite_difference
sides = pytest.mark.parametrize("side", SIDES)
KINDS = ("input", "weight")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mlp(*middle, dtype=torch.float64):
    layers = [nn.Linear(3, 6), *middle, nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).to(dtype)


def data(dtype=torch.float64):
    x = torch.randn(5, 3, dtype=torch.float64) * torch.tensor([0.3, 1, 2, 0.5, 1]).reshape(5, 1)
    return x.to(dtype)


def penalise(kind, net, x, estimator, **axes):
    """Return a penalty on the net's squared outputs, in the inputs or in the weights."""
    if kind == "input":
        penalty = gpkit.input_grad_norm(weight=0.7, estimator=estimator, **axes)
        return penalty(lambda x: net(x).square().squeeze(1), x)
    penalty = gpkit.weight_grad_norm(weight=0.7, estimator=estimator, **axes)
    return penalty(lambda: net(x).square().mean(), net)


def references(net, x, loss, form=lambda n: n**2):
    """Return the weight penalty's value and gradient, by torch.func."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def total(params):
        def of(p):
            return loss(torch.func.functional_call(net, p, (x,)))

        return 0.7 * form(oracles.weight_norm(of, params)).mean()

    grads, value = torch.func.grad_and_value(total)(params)
    return value, torch.cat([g.flatten() for g in grads.values()])


FORMS = {
    "squared": (gpkit.squared(), lambda n: n**2),
    "norm": (gpkit.norm(), lambda n: n),
    "two_sided": (gpkit.two_sided(0.4), lambda n: (n - 0.4) ** 2),
}


@sides
@pytest.mark.parametrize("form", FORMS)
def test_converges_in_the_weights(side, form):
    # catches a factor of two, a step that is not of unit direction, and a lost form
    net, x = mlp(), data()
    axis, function = FORMS[form]
    value, true = references(net, x, lambda y: y.square().mean(), function)
    errors = []
    for h in (1e-2, 1e-3):
        found = penalise("weight", net, x, fd(h, side), form=axis)
        assert relative_error(found, value) < 1e-12  # the value is the gradient's own norm
        errors.append(relative_error(gradients(found, net), true))
    order = torch.tensor(errors[0] / errors[1]).log10()
    assert order.item() == pytest.approx(2 if side == "central" else 1, abs=0.1)
    assert errors[1] < (1e-5 if side == "central" else 1e-2)


@sides
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_converges_in_the_inputs(side, norm):
    net, x = mlp(), data()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def total(params):
        def f(x):
            return torch.func.functional_call(net, params, (x[None],)).square().sum()

        return 0.7 * oracles.input_norms(f, 1, x, norm=norm).square().mean()

    grads, value = torch.func.grad_and_value(total)(params)
    true = torch.cat([g.flatten() for g in grads.values()])
    errors = []
    for h in (1e-2, 1e-3):
        found = penalise("input", net, x, fd(h, side), form=gpkit.squared(norm=norm))
        errors.append((relative_error(found, value), relative_error(gradients(found, net), true)))
    for first, second in zip(*errors, strict=True):
        order = torch.tensor(first / second).log10()
        assert order.item() == pytest.approx(2 if side == "central" else 1, abs=0.15)
    assert errors[1][1] < (1e-4 if side == "central" else 2e-2)


@kinds
@sides
@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float32, 5e-3), (torch.float64, 1e-6)])
def test_default_step_is_near_the_best(kind, side, dtype, bounds):
    net, x = mlp(), data()
    exact = gradients(penalise(kind, net, x, "exact"), net)
    twin, x = copy.deepcopy(net).to(dtype), x.to(dtype)

    def error(h):
        return relative_error(gradients(penalise(kind, twin, x, fd(h, side)), twin).double(), exact)

    default = error(None)
    assert default < bounds
    assert default < 20 * min(error(10.0**-k) for k in range(1, 9))


def test_default_step_grows_with_the_numbers():
    # pixels of 255 in float32: a step of 7e-4 would be lost in their rounding
    net, x = mlp(dtype=torch.float32), 255 * data(torch.float32)
    with torch.no_grad():
        net[0].weight /= 255
    exact = gradients(penalise("input", net, x, "exact"), net)
    found = gradients(penalise("input", net, x, "finite_difference"), net)
    assert relative_error(found, exact) < 1e-2


@sides
def test_linear_regression_is_exact(side):
    # ∇L is linear, so that the difference is 2H∇L whatever the step
    X, t = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value, gradient = oracles.regression(X, t, w.detach())
    penalty = gpkit.weight_grad_norm(weight=1.0, estimator=fd(0.5, side))
    found = penalty(lambda: (X @ w - t).square().sum() / 14, [w])
    assert relative_error(found, value) < 1e-12
    assert relative_error(torch.autograd.grad(found, w)[0], gradient) < 1e-12


@kinds
def test_piecewise_linear_value_is_right(kind):
    net = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 1)).double()
    x = data()
    exact, found = (
        gpkit.GradientPenalty(wrt=kind, estimator=e)(
            net if kind == "input" else lambda: net(x).mean(), x if kind == "input" else net
        )
        for e in ("exact", "finite_difference")
    )
    assert relative_error(found, exact) < 1e-7


def test_subset_is_moved_and_all_are_trained():
    # d‖g_P‖²/dθ = 2 H[:, P] g_P: catches a step along the whole gradient, or a part of the rows
    net, x = mlp(), data()
    both = [
        gradients(
            gpkit.weight_grad_norm(match="2.*", estimator=e)(lambda: net(x).square().mean(), net),
            net,
        )
        for e in ("exact", fd(1e-5, "central"))
    ]
    assert relative_error(both[1], both[0]) < 1e-7
    assert all(part.any() for part in both[1].split([24, 28, 5]))
    by_list = gpkit.weight_grad_norm(estimator=fd(1e-5, "central"))(
        lambda: net(x).square().mean(), net[2].parameters()
    )
    torch.testing.assert_close(gradients(by_list, net), both[1])


def test_scope_sample():
    net, x = mlp(), data()
    exact, found = (
        gradients(
            gpkit.weight_grad_norm(scope="sample", estimator=e)(
                lambda: net(x).square().squeeze(1), net
            ),
            net,
        )
        for e in ("exact", fd(1e-5, "central"))
    )
    assert relative_error(found, exact) < 1e-7


def test_several_inputs_have_one_step():
    net, x = mlp(), data()
    whole = gradients(penalise("input", net, x, fd(0.1)), net)
    pair = gpkit.input_grad_norm(weight=0.7, estimator=fd(0.1))(
        lambda a, b: net(torch.cat([a, b], 1)).square().squeeze(1), (x[:, :1], x[:, 1:])
    )
    torch.testing.assert_close(gradients(pair, net), whole)


@kinds
@sides
@pytest.mark.parametrize("form", FORMS)
def test_a_zero_gradient_is_harmless(kind, side, form):
    net, x = mlp(), data()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    found = penalise(kind, net, x, fd(None, side), form=FORMS[form][0])
    assert found.item() == pytest.approx(0.7 * 0.16 if form == "two_sided" else 0.0)
    assert gradients(found, net).isfinite().all()


@kinds
def test_nan_is_not_masked(kind):
    net, x = mlp(), data()
    x[0] = torch.nan
    assert penalise(kind, net, x, "finite_difference").isnan()


def test_weights_are_given_back_bit_for_bit():
    # subtracting the step again would leave a rounding error
    net, x = mlp(dtype=torch.float32), data(torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    loss = net(x).square().mean()  # a graph that has saved the weights
    total = loss + penalise("weight", net, x, fd(0.3, "central"))
    assert all(map(torch.equal, before, net.parameters()))
    total.backward()  # catches a version that has moved


def test_weights_are_given_back_when_the_closure_raises():
    net, x, calls = mlp(), data(), []
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        calls.append(net[0].weight.detach().clone())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return net(x).square().mean()

    with pytest.raises(KeyboardInterrupt):
        gpkit.weight_grad_norm(estimator="finite_difference")(closure, net)
    assert not torch.equal(*calls)
    assert all(map(torch.equal, before, net.parameters()))
    with (
        pytest.raises(RuntimeError),
        perturbed([before[0]], [torch.zeros(2, 2)]),
    ):  # cannot be added
        pass


@kinds
@sides
def test_no_side_effects(kind, side):
    net, x = mlp(nn.BatchNorm1d(6), nn.Dropout(0.3)), data()
    net[0].bias.requires_grad_(False)
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    before = copy.deepcopy((net.state_dict(), x)), torch.get_rng_state()
    penalise(kind, net, x, fd(None, side))
    torch.testing.assert_close(
        ((net.state_dict(), x), torch.get_rng_state()), before, rtol=0, atol=0
    )
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["0.weight"]
    assert (net[0].weight.grad == 7).all()
    assert not net[0].bias.requires_grad
    assert not x.requires_grad


@kinds
def test_points_share_a_dropout_mask(kind):
    # with masks of their own the difference would be of order 1/h
    net, x = mlp(nn.Dropout(0.5)), data()
    pair = [
        gradients(penalise(kind, net, x, e, seed=3), net) for e in ("exact", fd(1e-5, "central"))
    ]
    assert relative_error(pair[1], pair[0]) < 1e-6


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2


@kinds
def test_once_differentiable_function(kind):
    net, x = mlp(), data()
    exact = gradients(penalise(kind, nn.Sequential(net, Power()), x, "exact"), net)
    once = nn.Sequential(net, Power(Cube.apply))
    assert (
        relative_error(gradients(penalise(kind, once, x, fd(1e-5, "central")), net), exact) < 1e-6
    )


class Power(nn.Module):
    def __init__(self, function=lambda x: x**3):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 12)
        self.fused = True

    def forward(self, x):
        q, k, v = self.mix(x[:, None, None, :] * torch.arange(1, 5).to(x)[:, None]).chunk(3, -1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if self.fused else SDPBackend.MATH):
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.flatten(1).sum(1, keepdim=True)


@kinds
def test_fused_attention(kind):
    net, x = Attention().double(), data()
    found = gradients(penalise(kind, net, x, fd(1e-5, "central")), net)
    with pytest.raises(RuntimeError, match="fused attention has no double backward"):
        penalise(kind, net, x, "exact")
    net.fused = False
    assert relative_error(found, gradients(penalise(kind, net, x, "exact"), net)) < 1e-6


@kinds
def test_compiled_net(kind):
    # catches a trace that takes in the hooks of the isolation, and is made anew at every call
    net, x, graphs = mlp(*[nn.BatchNorm1d(6)] * (kind == "weight")), data(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(net, backend=backend)
    exact = gradients(penalise(kind, net, x, "exact"), net)
    before = copy.deepcopy(net.state_dict())
    for _ in range(6):
        found = gradients(penalise(kind, compiled, x, fd(1e-5, "central")), net)
        assert relative_error(found, exact) < 1e-6
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert len(graphs) <= 2


def counted(net, x):
    """Return a closure, and the lists of its forwards and backwards."""
    forwards, backwards = [], []

    def closure():
        forwards.append(1)
        loss = net(x).square().mean()
        loss.register_hook(backwards.append)
        return loss

    return closure, forwards, backwards


@pytest.mark.parametrize(
    "build",
    [
        partial(gpkit.weight_grad_norm, weight=0.3, estimator=fd(0.1)),
        partial(gpkit.weight_grad_norm, weight=0.3, estimator=fd(0.1, "backward"), match="2.*"),
        partial(gpkit.weight_grad_norm, form=gpkit.two_sided(0.4), estimator=fd(0.1)),
        gpkit.gnp,
    ],
)
def test_with_loss_is_the_sum_for_two_passes(build):
    net, x = mlp(), data()
    closure, forwards, backwards = counted(net, x)
    total = build().with_loss(closure, net)
    found = gradients(total, net)
    assert len(forwards) == len(backwards) == 2
    apart = net(x).square().mean() + build()(closure, net)
    torch.testing.assert_close(total, apart)
    torch.testing.assert_close(found, gradients(apart, net), rtol=1e-12, atol=1e-12)


def test_with_loss_leaves_the_traces_of_one_forward():
    # batch statistics and random numbers as a plain step; the other point has the same mask
    net, x = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5)), data()
    plain = copy.deepcopy(net)
    state = torch.get_rng_state()
    loss = plain(x).square().mean()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    penalty = gpkit.weight_grad_norm(weight=0.3, estimator=fd(1e-5, "central"))
    total = penalty.with_loss(lambda: net(x).square().mean(), net)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))
    exact = loss + gpkit.weight_grad_norm(weight=0.3)(loss, plain)
    torch.testing.assert_close(total, exact)
    assert relative_error(gradients(total, net), gradients(exact, plain)) < 1e-6


def test_with_loss_of_other_estimators_scopes_and_modes():
    net, x = mlp(), data()
    losses = partial(lambda: net(x).square().squeeze(1))
    loss = losses().mean()
    exact = gpkit.weight_grad_norm(weight=0.3)
    both = exact.with_loss(lambda: losses().mean(), net), loss + exact(loss, net)
    torch.testing.assert_close(*[gradients(b, net) for b in both])
    lazy = gpkit.gnp(every=2)
    steps = [lazy.with_loss(lambda: losses().mean(), net) for _ in range(2)]
    torch.testing.assert_close(steps[1], loss)
    torch.testing.assert_close(gradients(steps[1], net), gradients(losses().mean(), net))
    sample = gpkit.weight_grad_norm(scope="sample", estimator=fd(0.1))
    torch.testing.assert_close(
        gradients(sample.with_loss(losses, net), net),
        gradients(losses().mean() + sample(losses, net), net),
    )
    with torch.no_grad():
        value = gpkit.gnp().with_loss(lambda: losses().mean(), net)
    torch.testing.assert_close(value, gpkit.gnp().with_loss(lambda: losses().mean(), net).detach())
    assert not value.requires_grad


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_gnp_is_sam(alpha):
    net, x = mlp(), data()
    params = list(net.parameters())
    first = torch.autograd.grad(net(x).square().mean(), params)
    norm = torch.cat([g.flatten() for g in first]).norm()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p, g in zip(twin.parameters(), first, strict=True):
            p += 0.05 * g / norm
    second = gradients(twin(x).square().mean(), twin)
    sam = (1 - alpha) * torch.cat([g.flatten() for g in first]) + alpha * second
    together = gpkit.gnp(alpha=alpha).with_loss(lambda: net(x).square().mean(), net)
    apart = net(x).square().mean() + gpkit.gnp(alpha=alpha)(lambda: net(x).square().mean(), net)
    for total in (together, apart):
        assert relative_error(gradients(total, net), sam) < 1e-10
        assert relative_error(total, net(x).square().mean() + alpha * 0.05 * norm) < 1e-12


@pytest.mark.parametrize("name", ["weight_grad_norm", "input_grad_norm", "gnp", "cure"])
def test_in_a_lightning_module(name):
    net, x, y = mlp(), data(), torch.zeros(5, 1).double()
    axes = {} if name in ("gnp", "cure") else {"estimator": fd(1e-5, "central")}
    penalty = getattr(gpkit, name)(weight=0.7, **axes)
    module = gpkit.PenalizedModule(net, loss=nn.MSELoss(), penalty=penalty)
    found = gradients(module.penalized_loss((x, y)), net)
    loss = net(x).square().mean()
    args = (
        (lambda x: net(x).square().squeeze(1), x)
        if name in ("input_grad_norm", "cure")
        else (lambda: net(x).square().mean(), net)
    )
    again = getattr(gpkit, name)(weight=0.7, **axes)(*args)
    assert relative_error(found, gradients(loss + again, net)) < 1e-10
    with pytest.raises(ValueError, match="evaluates the net at other points"):
        gpkit.PenalizedModule(net, loss=nn.MSELoss(), penalty=penalty, compile=True)


def call(**axes):
    return partial(gpkit.GradientPenalty, **axes)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (call(estimator=fd(), order=2), r"takes order=1; got order=2: use estimator='projection'"),
        (call(estimator="cure"), "must be one of 'exact', 'projection', 'finite_difference'"),
        (lambda: fd(0.0), r"`finite_difference\(step=...\)` must be a number > 0; got 0.0"),
        (lambda: fd(side="centre"), r"got 'centre' \(did you mean 'central'\?\)"),
        (lambda: curvature_difference(-1), "must be a number > 0; got -1"),
        (call(estimator=curvature_difference(), wrt="weight"), "needs wrt='input'"),
        (
            lambda: gpkit.cure()(torch.zeros(5, requires_grad=True), torch.zeros(5, 1)),
            "the samples do not require grad",
        ),
        (
            lambda: gpkit.GradientPenalty(estimator=fd())(lambda x: x * 2, data()),
            "takes one output per group; got 3: use estimator='projection' or 'exact'",
        ),
    ],
)
def test_refuses(act, said):
    with pytest.raises(ValueError, match=said):
        act()


def test_refuses_a_graph_without_the_function():
    net, x = mlp(), data().requires_grad_()
    y = net(x)
    with pytest.raises(ValueError, match=r"needs a callable.* got a tensor: use penalty\(f, x\)"):
        gpkit.input_grad_norm(estimator=fd())(y, x)
    with pytest.raises(ValueError, match=r"penalty\(closure, net\), or estimator='exact'"):
        gpkit.gnp()(y.mean(), net)
    loss = y.mean()
    with pytest.raises(RuntimeError, match="the closure returned the same tensor twice"):
        gpkit.gnp()(lambda: loss, net)
    with pytest.raises(TypeError, match="is for weight penalties"):
        gpkit.input_grad_norm().with_loss(lambda: loss, net)
    with pytest.raises(TypeError, match="takes a function that returns the loss; got a Tensor"):
        gpkit.gnp().with_loss(loss, net)
    moved = [p * 1 for p in net.parameters()]
    with pytest.raises(ValueError, match="one of them is not a leaf tensor: give"):
        gpkit.gnp()(lambda: moved[0].square().sum(), moved)


@kinds
def test_refuses_what_trains_nothing(kind):
    net, other, x = mlp(), mlp(), data()
    penalty = gpkit.GradientPenalty(wrt=kind, estimator=fd())
    args = (lambda z: net(x) + 0 * z.detach().sum(), x)
    if kind == "weight":
        args = (lambda: net(x).mean(), other)
    with pytest.raises(RuntimeError, match=f"does not depend on the {kind}s"):
        penalty(*args)


def test_a_module_takes_two_forwards_and_two_backwards_a_step():
    # catches a training forward that the penalty does not make use of, another dropout mask, and
    # batch statistics that move twice
    torch.manual_seed(0)
    net = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5))
    by_hand, x, y = copy.deepcopy(net), data(), torch.randn(5, 1, dtype=torch.float64)
    penalty = gpkit.weight_grad_norm(weight=0.3, estimator=fd(1e-4))
    module = gpkit.PenalizedModule(net, nn.MSELoss(), copy.deepcopy(penalty))
    forwards, backwards = [], []
    net[0].register_forward_hook(lambda *_: forwards.append(1))
    net[-1].register_full_backward_hook(lambda *_: backwards.append(1))

    torch.manual_seed(1)
    total = module.penalized_loss((x, y))
    after = torch.get_rng_state()
    total.backward()
    assert (len(forwards), len(backwards)) == (2, 2)

    torch.manual_seed(1)
    expected = penalty.with_loss(lambda: nn.functional.mse_loss(by_hand(x), y), by_hand)
    expected.backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(total, expected)
    for found, wanted in zip(net.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)
    torch.testing.assert_close(net.state_dict(), by_hand.state_dict(), rtol=0, atol=0)
