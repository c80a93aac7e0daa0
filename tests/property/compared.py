"""What a call gives besides the samples: a target g, a metric A, and weights of the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.property.config import Config


@dataclass
class Given:
    """For each variable a target and a metric in the shape of the derivative; and weights."""

    targets: list[Tensor] | None  # [G, m, *S, ...], or [m, *S] in weights
    metrics: list[Tensor] | None  # [*S]
    weights: Tensor | None  # [samples]


def factor(x: Tensor) -> Tensor:
    """Return the metric at a variable: what a function of the user's would return."""
    return x.abs() + 0.5


def sample_weights(c: Config, points: int, dtype: torch.dtype) -> Tensor:
    """Return weights of the samples; some are zero."""
    rng = torch.Generator().manual_seed(c.seed + 1)
    weights = torch.rand(points, generator=rng, dtype=torch.float64).to(dtype).double() + 0.25
    weights[1::3] = 0
    return weights


def given(
    c: Config, shapes: list[Any], outputs: int, points: int, shift: Tensor, dtype: torch.dtype
) -> Given:
    """Return what a call gives, from the seed alone. The target is trained with the generator.

    Args:
        c: the configuration.
        shapes: of one sample of each variable; or of the parameters.
        outputs: m.
        points: the number of points.
        shift: the parameter of the generator.
        dtype: of the call.
    """
    rng = torch.Generator().manual_seed(c.seed)
    lead = (outputs,) if c.in_weights else (points, outputs)

    def numbers(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=rng, dtype=torch.float64)
        return drawn.to(dtype).double()

    targets = [numbers(*lead, *tuple(s) * c.order) for s in shapes]
    masks = [(numbers(*tuple(s) * c.order) > -0.5) * 1.5 for s in shapes]
    weights = sample_weights(c, points, dtype)
    return Given(
        [g * (1 + shift.double()) for g in targets] if c.target else None,
        masks if c.metric == "mask" else None,
        weights if c.weigh else None,
    )


def as_arguments(c: Config, found: Given, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of a call, in the shapes that users have."""
    arguments: dict[str, Any] = {}
    if found.targets is not None:
        at = 0 if c.in_weights else 1
        gs = [g.squeeze(at) if g.shape[at] == 1 else g for g in found.targets]
        arguments["target"] = [g.to(dtype) for g in gs]
    if found.metrics is not None:
        arguments["metric"] = [a.to(dtype) for a in found.metrics]
    arguments = {k: v if len(v) > 1 else v[0] for k, v in arguments.items()}
    if c.metric == "function":
        arguments["metric"] = factor
    if found.weights is not None:
        arguments["sample_weight"] = found.weights.to(dtype)
    return arguments


def entries(parts: list[Tensor], lead: tuple[int, int], sizes: list[int], order: int) -> Tensor:
    """Return parts for each variable as ``[G or 1, m or 1, n, ..., n]``."""
    if order > 1:
        return parts[0].reshape(*lead, *[sizes[0]] * order)
    return torch.cat([part.reshape(*lead, -1) for part in parts], 2)
