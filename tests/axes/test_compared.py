"""`target=`, `metric=` and `sample_weight=` of a call, against hand-written formulas in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

import gpkit

B = 5
RNG = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def conv(outputs=1):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, outputs)
    )
    return net.double()


NET = conv()
X = draw(B, 2, 3, 3) * torch.tensor([0.1, 2.0, 0.5, 3.0, 1.0]).reshape(B, 1, 1, 1)
G = draw(B, 2, 3, 3)
MASK = (draw(2, 3, 3) > 0).double()
SCALE = draw(B, 1, 3, 3).exp()
W = torch.tensor([1.0, 0.0, 2.5, 0.3, 1.0], dtype=torch.float64)

NORMS = {
    "l2": lambda e: e.flatten(1).square().sum(1).sqrt(),
    "l1": lambda e: e.flatten(1).abs().sum(1),
    "linf": lambda e: e.flatten(1).abs().amax(1),
}


def params_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def slopes(params, x=X, net=NET):
    """Return the gradient of each sample's output, by torch.func."""

    def f(z):
        return functional_call(net, params, (z.unsqueeze(0),)).sum()

    return vmap(grad(f))(x)


def by_hand(target=0.0, metric=1.0, w=None, norm="l2", form=lambda n: n**2):
    """Return the value and its gradient in the parameters."""

    def value(params):
        values = form(NORMS[norm](metric * (slopes(params) - target)))
        return values.mean() if w is None else (w * values).sum() / w.sum()

    grads = grad(value)(params_of(NET))
    return value(params_of(NET)), torch.cat([g.flatten() for g in grads.values()])


def measured(penalty, *args, net=NET, **given):
    value = penalty(*args, **given)
    grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    pairs = zip(grads, net.parameters(), strict=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in pairs]
    return value.detach(), torch.cat([g.flatten() for g in flat])


def assert_same(found, wanted, rtol=1e-9):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


GIVEN = {
    "target": {"target": G},
    "mask": {"metric": MASK},
    "both": {"target": G, "metric": SCALE},
    "weights": {"sample_weight": W},
    "all": {"target": G, "metric": SCALE, "sample_weight": W},
}
ESTIMATORS = {
    "exact": (gpkit.exact(), 1e-9),
    "projection": (gpkit.projection(), 1e-9),
    "difference": (gpkit.finite_difference(side="central"), 1e-7),
    "step": (gpkit.finite_difference(1e-4, "central"), 1e-6),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize(("estimator", "rtol"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_inputs_for_a_callable(given, estimator, rtol):
    penalty = gpkit.GradientPenalty(estimator=estimator)
    wanted = by_hand(given.get("target", 0.0), given.get("metric", 1.0), given.get("sample_weight"))
    assert_same(measured(penalty, NET, X, **given), wanted, rtol)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_inputs_for_a_tensor(given):
    x = X.clone().requires_grad_()
    wanted = by_hand(given.get("target", 0.0), given.get("metric", 1.0), given.get("sample_weight"))
    assert_same(measured(gpkit.GradientPenalty(), NET(x), x, **given), wanted)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["exact", "difference", "step"])
def test_other_norms_and_forms(norm, name):
    estimator, rtol = ESTIMATORS[name]
    penalty = gpkit.GradientPenalty(form=gpkit.two_sided(0.7, norm=norm), estimator=estimator)
    wanted = by_hand(G, SCALE, W, norm, lambda n: (n - 0.7) ** 2)
    found = measured(penalty, NET, X, target=G, metric=SCALE, sample_weight=W)
    assert_same(found, wanted, rtol)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_target_with_a_graph_is_trained(name):
    estimator, rtol = ESTIMATORS[name]
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = gpkit.GradientPenalty(estimator=estimator)(NET, X, target=scale * G, metric=SCALE)
    (found,) = torch.autograd.grad(value, scale)
    g = slopes(params_of(NET))
    wanted = (2 * SCALE**2 * (0.5 * G - g) * G).flatten(1).sum(1).mean()
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


def test_a_linear_function_is_pulled_to_its_target():
    """‖w - g‖² for f = w·x, whose gradient is 2 (w - g)."""
    w, g = draw(3).requires_grad_(), draw(3)
    value = gpkit.GradientPenalty()(lambda x: x @ w, draw(4, 3), target=g)
    torch.testing.assert_close(value, (w - g).square().sum())
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], 2 * (w - g))


def test_forces_of_a_molecule():
    """The mean over samples of ‖-∇E - F‖², from dict-free inputs [B, N, 3]."""
    x, forces, k = draw(4, 6, 3), draw(4, 6, 3), torch.tensor(1.3, dtype=torch.float64)
    k.requires_grad_()
    penalty = gpkit.GradientPenalty(of=lambda energy: -energy)
    value = penalty(lambda x: k / 2 * x.flatten(1).square().sum(1), x, target=forces)
    torch.testing.assert_close(value, (-k * x - forces).flatten(1).square().sum(1).mean())


def test_several_inputs():
    x, c, gx, gc = draw(B, 3), draw(B, 2, 2), draw(B, 3), draw(B, 2, 2)
    a = draw(3, 4).requires_grad_()

    def f(x, c):
        return (torch.tanh(x @ a) * c.flatten(1)).sum(1)

    value = gpkit.GradientPenalty()(f, (x, c), target=(gx, gc), metric=(2.0, MASK[0, :2, :2]))
    dx = ((1 - torch.tanh(x @ a) ** 2) * c.flatten(1)) @ a.T
    dc = torch.tanh(x @ a).reshape(B, 2, 2)
    parts = (
        (2 * (dx - gx)).square().sum(1),
        (MASK[0, :2, :2] * (dc - gc)).flatten(1).square().sum(1),
    )
    torch.testing.assert_close(value, sum(parts).mean())


@pytest.mark.parametrize(
    "estimator", ["exact", gpkit.projection(20_000)], ids=["exact", "projection"]
)
def test_several_outputs(estimator):
    net, g = conv(3), draw(B, 3, 2, 3, 3)
    J = vmap(jacrev(lambda z: net(z.unsqueeze(0))[0]))(X).detach()
    penalty = gpkit.GradientPenalty(estimator=estimator, seed=0)
    wanted = (MASK * (J - g)).flatten(1).square().sum(1)
    rtol = 1e-9 if estimator == "exact" else 0.02
    found = penalty.terms(net, X, target=g, metric=MASK).values
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)
    if estimator == "exact":
        A = draw(B, 3, 2, 3, 3)
        found = penalty.terms(net, X, target=g, metric=A).values
        torch.testing.assert_close(found, (A * (J - g)).flatten(1).square().sum(1))


def test_a_second_derivative():
    A = draw(3, 3).requires_grad_()
    x, g, mask = draw(4, 3), draw(4, 3, 3), (draw(3, 3) > 0).double()
    penalty = gpkit.GradientPenalty(order=2, estimator="exact")
    value = penalty(lambda x: torch.einsum("bi,ij,bj->b", x, A, x), x, target=g, metric=mask)
    wanted = (mask * (A + A.T - g)).flatten(1).square().sum(1).mean()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(torch.autograd.grad(value, A)[0], torch.autograd.grad(wanted, A)[0])


def test_pixels():
    x, g, w = draw(2, 3, 2, 2), draw(2, 3, 2, 2), torch.tensor([1.0, 0.5])
    a = draw(3, 2, 2).requires_grad_()
    penalty = gpkit.GradientPenalty(scope="pixel", form=gpkit.two_sided(1.0))
    n = (a - g).square().sum(1).sqrt()  # [B, H, W]
    wanted = ((n - 1) ** 2 * w.reshape(2, 1, 1)).sum() / (4 * w.sum())
    f = lambda x: (a * x).flatten(1).sum(1)  # noqa: E731
    torch.testing.assert_close(penalty(f, x, target=g, sample_weight=w), wanted)
    each = torch.rand(2, 2, 2, generator=RNG, dtype=torch.float64)
    wanted = ((n - 1) ** 2 * each).sum() / each.sum()
    torch.testing.assert_close(penalty(f, x, target=g, sample_weight=each), wanted)


@pytest.mark.parametrize("name", ["exact", "difference"])
def test_zero_and_one_weights_are_the_subset(name):
    """Also for samples whose value is not finite."""
    estimator = ESTIMATORS[name][0]
    x = X.clone()
    x[1] = torch.inf
    keep = torch.tensor([1, 0, 1, 1, 0])
    penalty = gpkit.GradientPenalty(estimator=estimator)
    found = penalty.terms(NET, x, sample_weight=keep)
    alone = penalty.terms(NET, X[keep.bool()])
    torch.testing.assert_close(found.reduced, alone.reduced)
    torch.testing.assert_close(found.mean_norm, alone.mean_norm)
    summed = gpkit.GradientPenalty(estimator=estimator, reduce="sum")
    torch.testing.assert_close(
        summed(NET, X, sample_weight=keep), summed(NET, X[keep.bool()]), rtol=1e-6, atol=0
    )
    zero = measured(gpkit.GradientPenalty(), NET, X, sample_weight=torch.zeros(B))
    assert float(zero[0]) == 0
    assert not zero[1].any()


Y = draw(B, 1)


def losses(params):
    return (functional_call(NET, params, (X,)) - Y).square().sum(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["exact", "difference", "step"])
@pytest.mark.parametrize("scope", ["batch", "global"])
def test_a_target_in_the_weights_with_a_graph_is_trained(scope, name, norm):
    estimator, rtol = ESTIMATORS[name]
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    g, a = ([f(draw(*p.shape)) for p in NET.parameters()] for f in (torch.sin, torch.exp))
    form = gpkit.two_sided(0.7, norm=norm)
    penalty = gpkit.GradientPenalty(wrt="weight", form=form, scope=scope, estimator=estimator)
    value = penalty(lambda: losses_of_net().mean(), NET, target=[scale * t for t in g], metric=a)
    (found,) = torch.autograd.grad(value, scale)

    def by_hand(scale):
        rows = grad(lambda p: losses(p).mean())(params_of(NET)).values()
        entries = [s * (r - scale * t) for r, t, s in zip(rows, g, a, strict=True)]
        return (NORMS[norm](torch.cat([e.reshape(1, -1) for e in entries], 1))[0] - 0.7) ** 2

    wanted = grad(by_hand)(scale.detach())
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


class Scaled(nn.Module):
    """A parameter without dimensions, and a bias of as many entries as there are outputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, x):
        return (x * self.scale + self.bias).tanh() ** 2


@pytest.mark.parametrize("given", [{}, {"target": 1}, {"metric": 1}, {"target": 1, "metric": 1}])
def test_several_outputs_in_the_weights(given):
    net, x = Scaled(), X.flatten(1)[:, :3]
    of_function = given and {"metric": torch.exp}
    g = [draw(3), draw(3, 3)] if "target" in given else [0.0, 0.0]
    a = [draw(3).exp(), draw(3, 3).exp()] if "metric" in given else [1.0, 1.0]
    arguments = {"target": g, "metric": a}

    def by_hand(params, a=a):
        rows = jacrev(lambda p: functional_call(net, p, (x,)).mean(0))(params).values()
        return sum(((r - t) * s).square().sum() for r, t, s in zip(rows, g, a, strict=True))

    def compare(wanted, **arguments):
        penalty = gpkit.GradientPenalty(wrt="weight")
        value = penalty(lambda: net(x), net, **arguments)
        found = torch.autograd.grad(value, list(net.parameters()))
        torch.testing.assert_close(value.detach(), wanted(params_of(net)))
        expected = grad(wanted)(params_of(net)).values()
        torch.testing.assert_close(list(found), list(expected))

    compare(by_hand, **{name: arguments[name] for name in given})
    if of_function:
        factors = [p.detach().exp() for p in net.parameters()]
        kept = {"target": g} if "target" in given else {}
        compare(lambda p: by_hand(p, factors), **kept, **of_function)


def losses_of_net():
    return (NET(X) - Y).square().sum(1)


@pytest.mark.parametrize("name", ["exact", "difference", "step"])
@pytest.mark.parametrize("scope", ["batch", "sample", "global"])
def test_gradient_matching_in_the_weights(name, scope):
    estimator, rtol = ESTIMATORS[name]
    rtol = 10 * rtol
    g = [draw(*p.shape) for p in NET.parameters()]
    a = [draw(*p.shape).exp() for p in NET.parameters()]

    def value(params):
        if scope == "sample":
            rows = [grad(lambda p, i=i: losses(p)[i])(params).values() for i in range(B)]
        else:
            rows = [grad(lambda p: losses(p).mean())(params).values()]
        squares = [
            sum((s * (r - t)).square().sum() for r, t, s in zip(row, g, a, strict=True))
            for row in rows
        ]
        return torch.stack(squares).mean()

    wanted = (
        value(params_of(NET)),
        torch.cat([v.flatten() for v in grad(value)(params_of(NET)).values()]),
    )
    penalty = gpkit.GradientPenalty(of="loss", wrt="weight", scope=scope, estimator=estimator)
    given = {"target": g, "metric": a}

    def closure():
        values = (NET(X) - Y).square().sum(1)
        return values if scope == "sample" else values.mean()

    assert_same(measured(penalty, closure, NET, **given), wanted, rtol)
    if name == "exact":
        assert_same(measured(penalty, closure(), NET.parameters(), **given), wanted)


@pytest.mark.parametrize("name", ["exact", "difference"])
@pytest.mark.parametrize("tensor", [False, True])
def test_weights_of_the_losses(name, tensor):
    """scope="batch" has the gradient of the weighted mean loss; "sample" weighs the values."""
    if tensor and name != "exact":
        pytest.skip("it needs a callable")
    estimator, rtol = ESTIMATORS[name]

    def whole(params):
        g = grad(lambda p: (W * losses(p)).sum() / W.sum())(params)
        return sum(v.square().sum() for v in g.values())

    def each(params):
        rows = [grad(lambda p, i=i: losses(p)[i])(params).values() for i in range(B)]
        values = torch.stack([sum(v.square().sum() for v in row) for row in rows])
        return (W * values).sum() / W.sum()

    for scope, value in (("batch", whole), ("sample", each)):
        penalty = gpkit.GradientPenalty(of="loss", wrt="weight", scope=scope, estimator=estimator)
        grads = grad(value)(params_of(NET)).values()
        wanted = value(params_of(NET)), torch.cat([v.flatten() for v in grads])
        closure = lambda: (NET(X) - Y).square().sum(1)  # noqa: E731
        found = measured(penalty, closure() if tensor else closure, NET, sample_weight=W)
        assert_same(found, wanted, 10 * rtol)


def test_a_scaled_gradient_has_the_same_norm():
    given = {"target": G, "metric": SCALE, "sample_weight": W}
    for name in ("exact", "difference"):
        penalty = gpkit.GradientPenalty(estimator=ESTIMATORS[name][0])
        plain, scaled = (measured(penalty, NET, X, scale=s, **given) for s in (None, 1024.0))
        assert_same(scaled, plain, 1e-7)


def test_a_metric_that_follows_the_variable():
    """Elasticities: ‖x ∘ ∇f‖²."""
    penalty = gpkit.GradientPenalty(metric=torch.abs)
    assert_same(measured(penalty, NET, X), by_hand(metric=X.abs()))
    assert_same(measured(penalty, NET, X, metric=SCALE), by_hand(metric=SCALE))
    assert "abs" in repr(penalty)


def test_a_sum_passes_what_is_given_to_each_part():
    parts = gpkit.sum({"a": gpkit.r1(weight=2.0), "b": gpkit.eikonal(weight=3.0)})
    found = measured(parts, NET, X, target=G, sample_weight=W)
    a, b = by_hand(G, w=W), by_hand(G, w=W, form=lambda n: (n - 1) ** 2)
    assert_same(found, [p + 3 * q for p, q in zip(a, b, strict=True)])


@pytest.mark.parametrize(
    ("axes", "given", "words"),
    [
        ({"estimator": gpkit.taylor()}, {"target": G}, "taylor.* takes no target= and no metric="),
        ({"estimator": "power_iteration"}, {"metric": MASK}, "takes no target="),
        ({"estimator": "projection", "order": 2}, {"target": 1.0}, "at order=1; got order=2"),
        ({}, {"target": G[:, :1]}, r"the derivative, \[5, 2, 3, 3\]; got \[5, 1, 3, 3\]"),
        ({}, {"target": G[:3]}, r"\[5, 2, 3, 3\]; got \[3, 2, 3, 3\]"),
        ({}, {"target": "forces"}, "target= must be a tensor; got a str"),
        ({}, {"target": [G, G]}, "one tensor for each of 1 inputs; got 2"),
        ({}, {"metric": G.clone().requires_grad_()}, "must be constant"),
        ({}, {"sample_weight": W[:3]}, r"one number for each sample, \[5\], or .*; got \[3\]"),
        ({}, {"sample_weight": -W}, "must be >= 0; got -2.5"),
        ({}, {"sample_weight": 0.5}, r"must be a tensor \[B\]; got a float"),
        ({"order": 2}, {"metric": torch.abs}, "takes order=1; got order=2: give a tensor"),
        ({"reduce": "max"}, {"sample_weight": W}, "reduce='mean' or 'sum'; got 'max'"),
        ({"form": gpkit.two_sided(gpkit.running_average())}, {"sample_weight": W}, "average"),
        ({"given": {"target": "forces"}}, {}, "needs target=.*entry 'forces' of the batch"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(axes, given, words):
    penalty = gpkit.GradientPenalty(**axes)
    with pytest.raises((ValueError, TypeError), match=words) as error:
        penalty(NET, X, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scope", "given", "words"),
    [
        ("batch", {"sample_weight": W}, r"needs losses \[B\]; got one number"),
        ("global", {"sample_weight": W}, "weigh the samples in the loss"),
        ("batch", {"target": [G]}, "each of 4 parameters that require grad; got 1"),
    ],
)
def test_what_makes_no_sense_in_the_weights_is_refused(scope, given, words):
    penalty = gpkit.weight_grad_norm(scope=scope)
    with pytest.raises(ValueError, match=words):
        penalty((NET(X) - Y).square().mean(), NET, **given)


def test_other_kinds_of_penalties_refuse():
    logits = draw(4, 2).requires_grad_()
    with pytest.raises(TypeError, match="irm takes no target=: it compares no derivative"):
        gpkit.irm()(logits, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), target=G)
    with pytest.raises(TypeError, match=r"takes no sample_weights= \(did you mean 'sample_weight'"):
        gpkit.r1().terms(NET, real=X, sample_weights=W)
    with pytest.raises(ValueError, match=r"must be one of 'target', 'metric', 'sample_weight'"):
        gpkit.r1(given={"targets": "forces"})
    with pytest.raises(TypeError, match="must be a function of the variable"):
        gpkit.r1(metric=MASK)


def test_one_norm_over_two_activations():
    """With a target and a metric for each of them, for a callable and for tensors."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1))
    net.double()
    x, goals = draw(B, 3), (draw(B, 4), draw(B, 2))
    penalty = gpkit.GradientPenalty(wrt=[gpkit.activation("0"), gpkit.activation("2")])
    u = net[0](x)
    v = net[2](torch.tanh(u))
    dv = (1 - torch.tanh(v) ** 2) * net[4].weight[0]
    du = (1 - torch.tanh(u) ** 2) * (dv @ net[2].weight)
    n2 = (du - goals[0]).square().sum(1) + (2 * (dv - goals[1])).square().sum(1)
    given = {"target": goals, "metric": (1.0, 2.0)}
    found = penalty(net, x, **given)
    torch.testing.assert_close(found, n2.mean())
    torch.testing.assert_close(penalty(net[3:](v), (u, v), **given), n2.mean())
    for a, b in zip(
        torch.autograd.grad(found, list(net.parameters())[:5]),
        torch.autograd.grad(n2.mean(), list(net.parameters())[:5]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("estimator", [gpkit.jvp(3), gpkit.random_difference(0.1, 3)])
def test_a_metric_without_a_target_in_forward_estimators(estimator):
    """As with a target of zero."""
    penalty = gpkit.GradientPenalty(estimator=estimator, seed=0)
    alone = penalty.terms(NET, X, metric=SCALE).norms
    torch.testing.assert_close(alone, penalty.terms(NET, X, metric=SCALE, target=0 * G).norms)
    assert alone.unique().numel() == B


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(6, 4)
        self.double().eval()

    def forward(self, inputs):
        h = torch.tanh(self.norm(self.a(inputs["positions"])))
        return (h * torch.tanh(self.b(inputs["cell"].flatten(1)))).sum(1)


@pytest.mark.parametrize("estimator", ["exact", gpkit.finite_difference(side="central")])
def test_samples_by_name_have_one_norm(estimator):
    net = OfDict()
    x = {"positions": draw(B, 3), "cell": draw(B, 2, 3)}
    g = {"cell": draw(B, 2, 3), "positions": draw(B, 3)}  # in any order
    penalty = gpkit.GradientPenalty(estimator=estimator)
    found = measured(penalty, net, x, net=net, target=g)

    def pair(positions, cell):
        return net({"positions": positions, "cell": cell})

    wanted = measured(
        gpkit.GradientPenalty(),
        pair,
        tuple(x.values()),
        net=net,
        target=(g["positions"], g["cell"]),
    )
    assert_same(found, wanted, 1e-7)
    net.train()
    before = net.norm.running_mean.clone()
    gpkit.wgan_gp().terms(net, real=x, fake={name: -value for name, value in x.items()})
    torch.testing.assert_close(net.norm.running_mean, before)


def test_a_tensor_of_samples_by_name():
    net = OfDict()
    x = {"positions": draw(B, 3).requires_grad_(), "cell": draw(B, 2, 3).requires_grad_()}
    torch.testing.assert_close(gpkit.r1()(net(x), real=x), gpkit.r1()(net, real=x))
    with pytest.raises(ValueError, match=r"target= must have the same keys as the samples"):
        gpkit.r1()(net, real=x, target={"positions": x["positions"]})


def test_a_weight_that_adapts_sees_the_weighted_mean_norm():
    weight = gpkit.target_norm(1.0, weight=2.0, rate=0.5)
    penalty = gpkit.GradientPenalty(weight=weight)
    penalty(NET, X, sample_weight=W, step=0)
    n = NORMS["l2"](slopes(params_of(NET)))
    mean = float((W * n).sum() / W.sum())
    assert abs(mean / float(n.mean()) - 1) > 0.1
    correction = 0.5 * min(1.0, max(-1.0, torch.tensor(mean).log().item()))
    assert weight(1) == pytest.approx(2.0 * torch.tensor(correction).exp().item(), rel=1e-5)


@pytest.mark.parametrize("estimator", [gpkit.jvp(2), gpkit.random_difference(0.1)])
def test_a_metric_of_each_output_is_refused_where_all_move_alike(estimator):
    penalty = gpkit.GradientPenalty(estimator=estimator)
    with pytest.raises(ValueError, match=r"same for all of them.*use estimator='exact'"):
        penalty(conv(2), X, metric=draw(B, 2, 2, 3, 3))
    exact = gpkit.GradientPenalty(estimator="exact")
    assert exact(conv(2), X, metric=draw(B, 2, 2, 3, 3)).isfinite()
