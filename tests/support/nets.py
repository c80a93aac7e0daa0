"""Nets that tests of several folders train."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class Net(nn.Module):
    """Two parts with names, 5 numbers to 3."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


class Seen(list):
    """A record that is kept: a penalty's own forward pass puts plain lists of a module back."""


class Witness(nn.Sequential):
    """Layers that keep a record of where they are evaluated in training."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.seen = Seen()

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach().clone())
        return super().forward(x)


class Noisy(nn.Module):
    """Dropout, and batch norm after it."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Tanh())
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.backbone(x)))


def noisy():
    torch.manual_seed(0)
    return Noisy().double()


class Cube(torch.autograd.Function):
    """x³, by a function that torch can differentiate once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2
