"""A target and a metric for gradients in weights that FSDP2 has sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from gpkit.autodiff.numerics import wide, widened
from gpkit.axes.given.given import Given
from gpkit.estimators.compared import Compared


@dataclass(frozen=True, eq=False)
class ShardedCompared(Compared):
    """A target g and a metric A with the layout of the weights: each process has its own entries.

    Args:
        targets: g, DTensors; None is 0.
        metrics: A, likewise; None is 1.
    """

    def detached(self) -> Compared:
        """Return itself: it has no graph."""
        return self

    def row(self, row: Sequence[Tensor], r: int = 0) -> list[Tensor]:
        """Return A ∘ (row - g) for gradients ``row``, in float32 or better."""
        if self.targets is not None:
            row = [widened(part) - g for part, g in zip(row, self.targets, strict=True)]
        return self.times(row, r)

    def times(self, row: Sequence[Tensor], r: int = 0) -> list[Tensor]:
        """Return A ∘ row."""
        if self.metrics is None:
            return list(row)
        return [widened(part) * a for part, a in zip(row, self.metrics, strict=True)]


def in_shards(given: Given | None, xs: Sequence[Tensor]) -> Compared | None:
    """Return what the gradient in sharded weights is compared with.

    Args:
        given: by the call and the penalty.
        xs: the weights, DTensors.

    Returns:
        Their target and metric with the layout of the weights; None if there is neither.
    """
    if given is None or (given.target is None and given.metric is None):
        return None
    target, metric = (_parts(name, getattr(given, name), xs) for name in ("target", "metric"))
    return ShardedCompared(target, metric)


def _parts(name: str, given: Any, xs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Return a target or metric for each weight.

    Raises:
        ValueError: if there is not one for each, a shape is another, or it has a graph.
    """
    if given is None:
        return None
    if callable(given):
        given = [given(x.detach()) for x in xs]
    parts = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(parts) != len(xs):
        raise ValueError(
            f"{name}= must have one tensor for each of {len(xs)} parameters that require grad; got "
            f"{len(parts)}"
        )
    return tuple(_placed(name, part, x) for part, x in zip(parts, xs, strict=True))


def _placed(name: str, given: Any, x: Any) -> Tensor:
    """Return a number, a tensor that each process has whole, or a DTensor as ``x`` is placed."""
    if isinstance(given, (int, float)):
        return torch.full_like(x.detach(), given, dtype=wide(x))
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}= must be a tensor; got a {type(given).__name__}")
    if given.requires_grad:
        raise ValueError(f"under FSDP {name}= must be constant; got one that requires grad")
    if given.shape != x.shape and (name == "target" or given.ndim > x.ndim):
        raise ValueError(
            f"{name}= must have the shape of the parameter, {list(x.shape)}; got "
            f"{list(given.shape)}"
        )
    given = given.to(wide(x)).expand(x.shape)
    if not isinstance(given, DTensor):
        everywhere = [Replicate()] * x.device_mesh.ndim
        given = DTensor.from_local(given.contiguous(), x.device_mesh, everywhere, run_check=False)
    placed: Tensor = given.redistribute(x.device_mesh, x.placements)
    return placed
