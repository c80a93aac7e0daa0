"""Small nets and samples that `gpkit.check_penalty` runs penalties on."""

import torch
from torch import nn

import gpkit

B = 6


def images(outputs=1):
    """A smooth net with slopes from far below one to far above, and two kinds of images."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, outputs)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5)
    size = torch.tensor([0.05, 2.0, 0.5, 8.0, 1.0, 0.3]).reshape(B, 1, 1, 1)
    real, fake = torch.randn(2, B, 2, 3, 3)
    return net, real * size, fake * size.flip(0)


def points(outputs=1):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)), torch.randn(B, 3)


def labels(outputs=3):
    return torch.tensor([0, 2, 1, 1, 0, 2])


def failures(fn, net, *samples, **options):
    return gpkit.check_penalty(fn, net, *samples, raise_exception=False, **options).failures
