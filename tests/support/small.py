"""A net of three numbers, and samples for it."""

import torch
from scenes import B
from torch import nn


def mlp(outputs=1, act=nn.Tanh, **dropout):
    hidden = [act(), *[nn.Dropout(p) for p in dropout.values()]]
    return nn.Sequential(nn.Linear(3, 4), *hidden, nn.Linear(4, outputs)).double()


def data(*shape):
    return torch.randn(B, *(shape or (3,)), dtype=torch.float64)
