"""A target or a metric in the shape of a derivative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.numerics import wide
from gpkit.estimators.base import Target


def rows_of(name: str, given: Any, target: Target, order: int) -> tuple[Tensor, ...] | None:
    """Return a target or metric as ``[G, R, n]`` for each variable."""
    if given is None:
        return None
    xs = target.xs
    if callable(given):
        if order > 1:
            raise ValueError(
                f"{name}= as a function of the variable takes order=1; got order={order}: give a "
                "tensor in the shape of the derivative"
            )
        given = tuple(given(x.detach()) for x in xs)
    parts = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if len(parts) != len(xs):
        what = "inputs" if target.batched else "parameters that require grad"
        raise ValueError(
            f"{name}= must have one tensor for each of {len(xs)} {what}; got {len(parts)}"
        )
    if order > 1 and (len(xs) > 1 or not target.batched):
        raise ValueError(
            f"{name}= takes order=1 for several variables and for weights; got order={order}"
        )
    return tuple(_fitted(name, part, x, target, order) for part, x in zip(parts, xs, strict=True))


def _fitted(name: str, given: Any, x: Tensor, target: Target, order: int) -> Tensor:
    """Return a target or metric for one variable as ``[G, R, n]``."""
    if isinstance(given, (int, float)):
        given = torch.tensor(float(given), device=x.device)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}= must be a tensor; got a {type(given).__name__}")
    if x.is_complex():
        raise ValueError(f"{name}= takes real variables; got {x.dtype}: use torch.view_as_real")
    if name == "metric" and given.requires_grad:
        raise ValueError("metric= must be constant; got a tensor that requires grad: detach it")
    outputs = 1 if target.mean else target.y.shape[1]
    groups, sample = (len(x), x.shape[1:]) if target.batched else (1, x.shape)
    full = (groups, outputs, *sample * order)
    if not target.batched and outputs > 1 and given.ndim == len(full) - 1:  # [m, *S]
        given = given.unsqueeze(0)
    shaped = _with_dimensions(given, full, broadcasts=name == "metric")
    if shaped is None:
        batch = [groups] if target.batched else []
        wanted = [*batch, *([outputs] if outputs > 1 else []), *sample * order]
        raise ValueError(
            f"{name}= must have the shape of the derivative, {wanted}; got {list(given.shape)}"
        )
    shaped, n = shaped.to(wide(x)), math.prod(sample)
    if name == "metric" and order == 1:  # one row where it is the same for all outputs
        return shaped.expand(*shaped.shape[:2], *sample).reshape(*shaped.shape[:2], n)
    return shaped.expand(full).reshape(groups, outputs * n ** (order - 1), n)


def _with_dimensions(given: Tensor, full: tuple[int, ...], *, broadcasts: bool) -> Tensor | None:
    """Return a tensor with the dimensions of a derivative ``full``, some of size one; or None.

    Args:
        given: of the whole batch ``[B, m, *S]``, without m if m = 1; of one sample; or one number.
        full: ``[B, m, *S]``, for m outputs.
        broadcasts: whether any dimension may have size one, and m be left out.
    """
    batch, outputs, *sample = full
    if given.ndim == 0:
        return given.reshape([1] * len(full))
    if given.ndim < len(full) and (outputs == 1 or broadcasts):
        alone = given.ndim == len(sample)  # of one sample
        given = given.unsqueeze(0).unsqueeze(0) if alone else given.unsqueeze(1)
    elif given.ndim > len(full) and len(given) == batch:  # [B, *O, *S]
        fits = list(given.shape[given.ndim - len(sample) :]) == sample
        given = given.reshape(full) if fits and given.numel() == math.prod(full) else given
    if given.ndim != len(full):
        return None
    free = range(len(full)) if broadcasts else range(1)
    sizes = enumerate(zip(given.shape, full, strict=True))
    return given if all(a == b or (a == 1 and i in free) for i, (a, b) in sizes) else None
