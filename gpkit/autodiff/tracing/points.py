"""Tensors that require grad, also inside of a compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.tracing.calls import TRACES


class _Lifted(torch.autograd.Function):
    """A copy of x that requires grad because the anchor does, and passes no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def variable(x: Tensor) -> Tensor:
    """Return the values of a tensor as a new variable, which requires grad.

    In a compiled loss ``requires_grad_()`` has no effect on what is computed inside, so the copy
    depends on a tensor outside that requires grad, without a gradient in it.
    """
    if TRACES:
        return _Lifted.apply(x.detach(), TRACES[-1].anchor)
    return x.detach().requires_grad_()
