"""Steps that repeat an earlier one, where something differs that the graph does not show."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import gpkit
from gpkit.shortcut.products import summed

LAMBDA = 0.3
BATCH, SAMPLE = gpkit.weight_grad_norm, gpkit.per_sample_grad_norm


@pytest.fixture(autouse=True)
def in_double(monkeypatch):
    monkeypatch.setattr(summed, "LARGE", 1000)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def wide():
    """Return a net in which Gram matrices pay, and the products of gradients are summed."""
    return nn.Sequential(
        nn.Linear(5, 90), nn.Tanh(), nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 3)
    )


def by_hand(losses, params, form=lambda n2: n2):
    """Return loss and penalty, and their gradients, from a gradient for each loss."""
    n2 = []
    for y in losses.unbind() if losses.ndim else [losses]:
        grads = torch.autograd.grad(y, params, create_graph=True, allow_unused=True)
        n2.append(sum(g.square().sum() for g in grads if g is not None))
    total = losses.mean() + LAMBDA * form(torch.stack(n2)).mean()
    return total.detach(), torch.autograd.grad(total, params, allow_unused=True)


def require_right(penalty, closure, net, params=None, form=lambda n2: n2):
    params = [*net.parameters()] if params is None else params
    expected, grads = by_hand(closure(), params, form)
    total = penalty.with_loss(closure, net)
    torch.testing.assert_close(total.detach(), expected, rtol=1e-9, atol=0)
    found = torch.autograd.grad(total, params, allow_unused=True)
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def loss_of(net, x, reduction="mean"):
    t = torch.arange(len(x)) % 3
    return lambda: F.cross_entropy(net(x), t, reduction=reduction)


class Scaled(nn.Module):
    """A product with a wide weight that is multiplied by a number."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.times = nn.Linear(5, 90), nn.Linear(80, 3), 1.0
        self.weight, self.bias = nn.Parameter(torch.randn(80, 90) / 9), nn.Parameter(torch.ones(80))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(torch.addmm(self.bias, h, self.weight.t(), alpha=self.times)))


def test_a_factor_of_a_product():
    net, penalty = Scaled(), BATCH(LAMBDA)
    for net.times in (1.0, 1.0, 2.0, 3.0):
        require_right(penalty, loss_of(net, torch.randn(6, 5)), net)


class Queries(nn.Module):
    """A wide layer whose input is a parameter."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 90))
        self.first, self.wide = nn.Linear(5, 90), nn.Linear(90, 90)

    def forward(self, x):
        return torch.tanh(self.first(x)) @ torch.tanh(self.wide(self.queries)).T


def test_the_input_of_a_wide_layer_is_a_parameter():
    net, penalty = Queries(), BATCH(LAMBDA)
    for _ in range(3):
        require_right(penalty, loss_of(net, torch.randn(6, 5)), net)


def test_a_form_has_a_parameter_of_its_own():
    net, c = wide(), torch.tensor(0.5, requires_grad=True)
    penalty, params = BATCH(LAMBDA, form=lambda n: (n - c) ** 2), [*net.parameters(), c]
    for _ in range(3):
        form = lambda n2: (n2.sqrt() - c) ** 2  # noqa: E731
        require_right(penalty, loss_of(net, torch.randn(6, 5)), net, params, form)


def test_a_form_gets_another_norm():
    net, penalty = wide(), BATCH(LAMBDA)
    closure = loss_of(net, torch.randn(6, 5))
    for _ in range(2):
        require_right(penalty, closure, net)
    penalty.form = gpkit.power(2, norm="linf")
    (loss := closure()).backward()
    top = max(p.grad.abs().max() for p in net.parameters())
    total = penalty.with_loss(closure, net)
    torch.testing.assert_close(total, loss + LAMBDA * top**2)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("make", "reduction"), [(BATCH, "mean"), (SAMPLE, "none")])
def test_a_forward_hook_changes_the_output_of_a_layer(make, reduction, late):
    net, penalty = wide(), make(LAMBDA)
    for step in range(4):
        if step == 2 * late:
            net[2].register_forward_hook(lambda module, args, z: 2 * z)
        require_right(penalty, loss_of(net, torch.randn(6, 5), reduction), net)


@pytest.mark.parametrize(("make", "reduction"), [(BATCH, "mean"), (SAMPLE, "none")])
def test_a_hook_on_the_output_of_a_layer_changes_its_gradient(make, reduction, recwarn):
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = wide()

        def forward(self, x):
            z = self.net[2](torch.tanh(self.net[0](x)))
            z.register_hook(lambda g: 2 * g)
            return self.net[4](torch.tanh(z))

    net, penalty = Hooked(), make(LAMBDA)
    for _ in range(3):
        require_right(penalty, loss_of(net, torch.randn(6, 5), reduction), net)
    closure = loss_of(net, torch.randn(6, 5))
    expected, _ = by_hand(closure(), [*net.parameters()])
    for loss in (closure(), closure()):
        torch.testing.assert_close(loss + BATCH(LAMBDA)(loss, net.parameters()), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_hook_on_the_first_layer_whose_weight_alone_is_penalised(bias):
    """No gradient comes through the layer where the penalty takes one, but where it is trained."""

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.last = nn.Linear(80, 90, bias=bias), nn.Linear(90, 3)

        def forward(self, x):
            z = self.wide(x)
            z.register_hook(lambda g: 2 * g)
            return self.last(torch.tanh(z))

    net, penalty = Hooked(), SAMPLE(LAMBDA, wrt=gpkit.weights("wide.weight"))
    for _ in range(3):
        closure = loss_of(net, torch.randn(6, 80), "none")
        losses = closure()
        n2 = sum(
            torch.autograd.grad(y, net.wide.weight, create_graph=True)[0].square().sum()
            for y in losses
        )
        params = [*net.parameters()]
        expected = torch.autograd.grad(losses.mean() + LAMBDA * n2 / 6, params)
        total = penalty.with_loss(closure, net)
        for one, other in zip(torch.autograd.grad(total, params), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_instance_norm_whose_node_has_saved_samples_as_channels():
    layers = nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Tanh(), nn.Flatten()
    net, penalty = nn.Sequential(*layers, nn.Linear(24, 3)), SAMPLE(LAMBDA)
    for size in (1, 6, 6, 3):
        require_right(penalty, loss_of(net, torch.randn(size, 2, 8), "none"), net)


def test_a_derivative_is_mended():
    """Torch's own second derivative of weight norm is wrong."""
    net = nn.Sequential(weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))
    x, t, params = torch.randn(6, 5), torch.arange(6) % 3, [*net.parameters()]
    g, v = net[0].parametrizations.weight.original0, net[0].parametrizations.weight.original1
    weight = g * v / v.square().sum(1, keepdim=True).sqrt()
    loss = F.cross_entropy(net[2](torch.tanh(F.linear(x, weight, net[0].bias))), t)
    expected, grads = by_hand(loss, params)
    penalty = BATCH(LAMBDA)
    for _ in range(3):
        total = penalty.with_loss(lambda: F.cross_entropy(net(x), t), net)
        torch.testing.assert_close(total.detach(), expected)
        for one, other in zip(torch.autograd.grad(total, params), grads, strict=True):
            torch.testing.assert_close(one, other)


def test_another_loss_shares_a_part_of_the_graph():
    net, penalty, kept = wide(), BATCH(LAMBDA), []
    x, t, params = torch.randn(6, 5), torch.arange(6) % 3, [*net.parameters()]

    def closure():
        kept[:] = [torch.tanh(net[0](x))]
        return F.cross_entropy(net[4](torch.tanh(net[2](kept[0]))), t)

    loss, options = closure(), {"retain_graph": True, "allow_unused": True}
    more = torch.autograd.grad(kept[0].square().mean(), params, **options)
    _, grads = by_hand(loss, params)
    for _ in range(3):
        net.zero_grad()
        (penalty.with_loss(closure, net) + kept[0].square().mean()).backward()
        for p, one, other in zip(params, grads, more, strict=True):
            torch.testing.assert_close(p.grad, one if other is None else one + other)


def test_samples_that_are_coupled_before_a_last_layer_of_zeros():
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wide, self.last = nn.Linear(5, 5), nn.Linear(5, 8), nn.Linear(8, 3)
            nn.init.zeros_(self.last.weight)

        def forward(self, x):
            h = self.first(x)
            return self.last(torch.tanh(self.wide(h - h.mean(0))))

    net, penalty = Coupled(), SAMPLE(LAMBDA)
    require_right(penalty, loss_of(net, torch.randn(6, 5), "none"), net)
    with torch.no_grad():
        net.last.weight.normal_()
    with pytest.warns(UserWarning, match="depend on each other"):
        require_right(penalty, loss_of(net, torch.randn(6, 5), "none"), net)


@pytest.mark.parametrize("late", [False, True])
def test_a_batch_norm_without_parameters_couples_the_samples(late, recwarn):
    net, penalty = wide(), SAMPLE(LAMBDA)
    net[1] = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(90, affine=False))
    for step in range(4):
        net[1][1].train(step >= 2 * late)
        require_right(penalty, loss_of(net, torch.randn(40, 5), "none"), net)
    assert any("by batch norm in training mode" in str(w.message) for w in recwarn)


def test_a_weight_that_is_computed_from_others():
    net, penalty = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), SAMPLE(LAMBDA)
    prune.l1_unstructured(net[0], "weight", 0.5)
    nn.init.zeros_(net[2].weight)
    with pytest.warns(UserWarning, match="Linear has no rule"):
        require_right(penalty, loss_of(net, torch.randn(6, 5), "none"), net)
    with torch.no_grad():
        net[2].weight.normal_()
    require_right(penalty, loss_of(net, torch.randn(6, 5), "none"), net)


def test_a_layer_is_replaced_by_one_with_the_same_weight():
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 36, 3)
    net, penalty = nn.Sequential(*layers), SAMPLE(LAMBDA)
    for step in range(4):
        if step == 2:
            net[0] = nn.Conv2d(2, 3, 3, padding=2, dilation=2)
            net[0].weight, net[0].bias = layers[0].weight, layers[0].bias
        require_right(penalty, loss_of(net, torch.randn(6, 2, 6, 6), "none"), net)


def test_a_part_of_the_loss_that_was_computed_before_is_refused():
    """It would stay as it is at moved weights, and the penalty would train nothing."""
    net, x, penalty = (
        nn.Linear(5, 3),
        torch.randn(6, 5),
        BATCH(LAMBDA, estimator="finite_difference"),
    )
    transpose = net.weight.t()
    with pytest.raises(RuntimeError, match="compute that inside the closure"):
        penalty.with_loss(lambda: torch.tanh(x @ transpose + net.bias).mean(), net)
    with pytest.raises(RuntimeError, match="compute that inside the closure"):
        penalty(lambda: torch.tanh(x @ transpose + net.bias).mean(), net)
    penalty.with_loss(lambda: torch.tanh(x @ net.weight.t() + net.bias).mean(), net)


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_a_class_with_a_way_of_its_own(estimator):
    class Doubled(gpkit.GradientPenalty):
        def evaluate(self, *args, **kwargs):
            terms = super().evaluate(*args, **kwargs)
            terms.reduced = 2 * terms.reduced
            return terms

    net, penalty = wide(), Doubled(wrt="weight", weight=LAMBDA / 2, estimator=estimator)
    closure = loss_of(net, torch.randn(6, 5))
    expected, _ = by_hand(closure(), [*net.parameters()])
    for _ in range(3):
        torch.testing.assert_close(penalty.with_loss(closure, net).detach(), expected)
        loss = closure()
        torch.testing.assert_close(loss + penalty(closure, net), expected)
