"""What the tests of estimators without a gradient in x share: nets, points, means over samples."""

import torch
from torch import nn

import gpkit

MANY = 200_000
RNG = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


W = draw(3)
H = draw(3, 3)
H = H + H.T
X = draw(3)


def mean_of(f, estimator, count=MANY, **given):
    """Return the mean of n² over many samples at X, and its standard error."""
    penalty = gpkit.GradientPenalty(estimator=estimator, seed=0)
    n2 = penalty.terms(f, X.repeat(count, 1), **given).squared_norms.detach()
    return float(n2.mean()), float(n2.std()) / count**0.5, float(n2.var())


def conv(*middle):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(27, 1)
    )
    return net.double()


def params_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def flat(grads):
    return torch.cat([g.reshape(-1) for g in grads])


IMAGES = draw(5, 2, 3, 3) * torch.tensor([0.1, 2.0, 0.5, 3.0, 1.0]).reshape(5, 1, 1, 1)
