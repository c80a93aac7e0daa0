"""A critic with labels, and its penalties sample by sample."""

import torch
from torch import nn

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
X = X * torch.linspace(0.2, 3, 6, dtype=torch.float64)[:, None]
Y = X.flip(0) - 1


class Labelled(nn.Module):
    """A critic with labels."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, z, label):
        return self.last(torch.tanh(self.first(torch.cat([z, label], 1))))

    def scaled(self, z):
        return 2 * self(z, z[:, :1])


def net():
    torch.manual_seed(0)
    return Labelled().double()


LABELS = torch.arange(6.0, dtype=torch.float64)[:, None]


def by_hand(f, z, value):
    """Return the penalty of a function at points, sample by sample."""
    total = 0
    for i in range(len(z)):
        x = z.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(f(x)[i].sum(), x, create_graph=True)
        total = total + value(g[i].square().sum())
    return total / len(z)


def require_right(penalty, call, critic, f, z, value):
    expected, found = by_hand(f, z, value), call()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    parameters = list(critic.parameters())
    grads = [torch.autograd.grad(t, parameters, allow_unused=True) for t in (found, expected)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
