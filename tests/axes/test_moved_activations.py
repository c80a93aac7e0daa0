"""Estimators that move an activation, against torch.func and double backprop by hand."""

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.func import functional_call, grad, vmap

import gpkit

B = 5


class Net(nn.Module):
    """`second` is computed from `first`, and the head reads both."""

    def __init__(self, trained=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(5, 1)
        self.drop = nn.Dropout(0.0)
        self.double()
        self.first.requires_grad_(trained)

    def forward(self, x):
        a = self.first(x)
        b = self.second(torch.tanh(a))
        return self.head(torch.cat([torch.sin(self.drop(a)), b.square()], 1)).squeeze(1)


X = torch.randn(B, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X = X * torch.tensor([0.1, 2.0, 0.5, 3.0, 1.0]).unsqueeze(1)


def n2(net, params, names):
    """Return ‖dy/d(a, b)‖² of each sample; y depends on a also through b."""

    def after(da, db, x):
        a = x @ params["first.weight"].T + params["first.bias"] + da
        b = torch.tanh(a) @ params["second.weight"].T + params["second.bias"] + db
        h = torch.cat([torch.sin(a), b.square()])
        return (h * params["head.weight"][0]).sum() + params["head.bias"][0]

    zeros = torch.zeros(B, 3, dtype=torch.float64), torch.zeros(B, 2, dtype=torch.float64)
    slopes = dict(zip(("first", "second"), vmap(grad(after, (0, 1)))(*zeros, X), strict=True))
    return sum(slopes[name].square().sum(1) for name in names)


def wanted(net, names):
    params = {name: p.detach() for name, p in net.named_parameters()}
    of = lambda params: n2(net, params, names).mean()  # noqa: E731
    return of(params), grad(of)(params)


def assert_is(net, value, names, rtol):
    true, grads = wanted(net, names)
    assert abs(float(value.detach()) - float(true)) < rtol * float(true)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    scale = max(float(g.norm()) for g in grads.values())
    for name, g in zip(trained, found, strict=True):
        g = torch.zeros_like(grads[name]) if g is None else g
        assert float((g - grads[name]).norm()) < rtol * scale, name


EXACTLY = {
    "exact": ("exact", 1e-12),
    "projection": ("projection", 1e-12),
    "difference": (gpkit.finite_difference(side="central"), 1e-7),
    "given step": (gpkit.finite_difference(1e-4, "central"), 1e-6),
    "stencil": (gpkit.stencil(1e-3, 4), 1e-7),
}
DRAWN = {"forward mode": gpkit.jvp(), "random": gpkit.random_difference(1e-4)}
DRAWN["taylor"] = gpkit.taylor()
NAMES = [("first",), ("second",), ("first", "second")]


@pytest.mark.parametrize("names", NAMES, ids="+".join)
@pytest.mark.parametrize(("estimator", "rtol"), EXACTLY.values(), ids=EXACTLY)
def test_in_activations(estimator, rtol, names):
    net = Net()
    wrt = [gpkit.activation(name) for name in names]
    penalty = gpkit.GradientPenalty(wrt=wrt, estimator=estimator, seed=0)
    assert_is(net, penalty(net, X), names, rtol)


@pytest.mark.parametrize("names", NAMES[1:], ids="+".join)
@pytest.mark.parametrize("estimator", DRAWN.values(), ids=DRAWN)
def test_in_activations_on_average(estimator, names):
    """Of many copies of each sample, each with a direction of its own."""
    net = Net()
    wrt = [gpkit.activation(name) for name in names]
    penalty = gpkit.GradientPenalty(wrt=wrt, estimator=estimator, seed=0)
    assert_is(net, penalty(net, X.repeat(4000, 1)), names, 0.06)


@pytest.mark.parametrize("name", ["difference", "stencil", "given step"])
@pytest.mark.parametrize("names", [("first",), ("first", "second")], ids="+".join)
def test_in_activations_that_nothing_trained_precedes(name, names):
    estimator, rtol = EXACTLY[name]
    net = Net(trained=False)
    wrt = [gpkit.activation(name) for name in names]
    penalty = gpkit.GradientPenalty(wrt=wrt, estimator=estimator, seed=0)
    assert_is(net, penalty(net, X), names, rtol)


def test_tokens_are_moved_after_their_embedding():
    """Of a frozen embedding: integers have no gradient, and no trained weight precedes h."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1)).double()
    net[0].requires_grad_(False)
    tokens = torch.tensor([[0, 3], [6, 1], [2, 2]])
    h = net[0](tokens)

    def by_hand(params):
        w = params["3.weight"].reshape(2, 3)
        return ((1 - torch.tanh(h) ** 2) * w).flatten(1).square().sum(1).mean()

    params = {name: p.detach() for name, p in net.named_parameters()}
    for estimator in ("exact", gpkit.stencil(1e-3, 4), gpkit.finite_difference(side="central")):
        value = gpkit.GradientPenalty(wrt=gpkit.activation("0"), estimator=estimator)(net, tokens)
        torch.testing.assert_close(value.detach(), by_hand(params), rtol=1e-8, atol=0)
        (found,) = torch.autograd.grad(value, net[3].weight)
        torch.testing.assert_close(found, grad(by_hand)(params)["3.weight"], rtol=1e-6, atol=1e-9)


def test_a_moved_pass_has_the_same_dropout():
    """With other masks the quotient would be of order 1/h."""
    net = Net()
    net.drop.p = 0.5
    penalty = gpkit.GradientPenalty(wrt=gpkit.activation("first"), estimator=gpkit.stencil(1e-4))
    terms = penalty.terms(net, X)
    bound = net.head.weight.detach().abs().sum() * 20
    assert 0 < float(terms.norms.detach().max()) < float(bound)


def test_a_tensor_is_no_function_of_its_activation():
    """The advice is followed."""
    net = Net()
    h = net.first(X)
    losses = net.head(torch.cat([h, h.square()[:, :2]], 1)).squeeze(1)
    penalty = gpkit.GradientPenalty(estimator="finite_difference")
    with pytest.raises(ValueError, match=r"got a tensor: use penalty\(f, x\), or estimator='exact"):
        penalty(losses, h)
    f = lambda h: net.head(torch.cat([h, h.square()[:, :2]], 1)).squeeze(1)  # noqa: E731
    exact = gpkit.GradientPenalty()(losses, h)
    torch.testing.assert_close(penalty(f, h), exact, rtol=1e-5, atol=0)
    functional_call(net, {}, (X,))  # as before: no hook was left
    assert not net.first._forward_hooks


class Fitted(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("name", ["exact", "difference", "stencil"])
def test_in_activations_that_follow_each_other_in_a_fit(name):
    """The callback moves the second too where the first moves it."""
    estimator, rtol = EXACTLY[name]
    wrt = [gpkit.activation("first"), gpkit.activation("second")]
    penalty = gpkit.GradientPenalty(wrt=wrt, estimator=estimator, weight=3.0)
    module, before = Fitted(), Net()
    callback = gpkit.GradientPenaltyCallback(penalty, module="net")
    options = {"max_steps": 1, "accelerator": "cpu", "logger": False, **QUIET}
    data = torch.utils.data.TensorDataset(X)
    pl.Trainer(callbacks=[callback], **options).fit(module, torch.utils.data.DataLoader(data, B))
    params = {name: p.detach() for name, p in before.named_parameters()}

    def total(params):
        loss = functional_call(before, params, (X,)).mean()
        return loss + 3 * n2(before, params, ("first", "second")).mean()

    for name, g in grad(total)(params).items():
        found = module.net.get_parameter(name).detach()
        torch.testing.assert_close(found, params[name] - 0.05 * g, rtol=max(rtol, 1e-9), atol=1e-7)
