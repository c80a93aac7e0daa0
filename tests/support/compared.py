"""What the tests of `target=`, `metric=` and `sample_weight=` share: net, samples, formula."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

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


ESTIMATORS = {
    "exact": (gpkit.exact(), 1e-9),
    "projection": (gpkit.projection(), 1e-9),
    "difference": (gpkit.finite_difference(side="central"), 1e-7),
    "step": (gpkit.finite_difference(1e-4, "central"), 1e-6),
}


Y = draw(B, 1)


def losses(params):
    return (functional_call(NET, params, (X,)) - Y).square().sum(1)


def losses_of_net():
    return (NET(X) - Y).square().sum(1)
