"""Critics whose repeated calls are compared with a loop by hand."""

import torch
from torch import nn


class Images(nn.Module):
    """A critic of the user's own, with plain attributes, one of which its forward writes."""

    def __init__(self):
        super().__init__()
        self.stride, self.note = 2, "new"
        self.conv, self.head = nn.Conv2d(3, 4, 3, self.stride), nn.Linear(4, 1)

    def forward(self, x):
        self.note = "used"
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))[:, 0]


def critic():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1)).double()


def chain(function, *widths, bias=True):
    """Return linear layers with a function between them, from 5 inputs."""
    torch.manual_seed(0)
    sizes = zip((5, *widths[:-1]), widths, strict=True)
    layers = [part for p, q in sizes for part in (nn.Linear(p, q, bias=bias), function)]
    return nn.Sequential(*layers[:-1]).double()


def samples(*shape):
    scale = torch.linspace(0.2, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * scale).double()


def by_hand(net, z, value, weight=1.0):
    """Return a penalty at points z, and its gradients in the parameters, sample by sample."""
    total = 0
    for point in z:
        x = point[None].detach().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        total = total + value(g.square().sum())
    total = weight * total / len(z)
    trained = [p for p in net.parameters() if p.requires_grad]
    return total, torch.autograd.grad(total, trained, allow_unused=True)


def require_right(penalty, net, x, value, weight=1.0):
    """Compare a call of a penalty at x with a loop, and its gradients."""
    expected, grads = by_hand(net, x, value, weight)
    found = penalty(net, real=x)
    trained = [p for p in net.parameters() if p.requires_grad]
    torch.testing.assert_close(found, expected)
    found = torch.autograd.grad(found, trained, allow_unused=True)
    for a, b in zip(found, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
