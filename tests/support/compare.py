"""Gradients as one vector, and how far it is from another."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradients(value: Tensor, net: nn.Module) -> Tensor:
    """Return the gradient in all parameters, ``[n]``; zero where there is none."""
    grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    pairs = zip(grads, net.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()
