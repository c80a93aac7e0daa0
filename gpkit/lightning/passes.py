"""A forward pass, and what each penalty differentiates of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpkit import captures
from gpkit.environments import EnvironmentPenalty
from gpkit.isolation import RandomState
from gpkit.penalty import GradientPenalty
from gpkit.variables import weights


@dataclass(frozen=True)
class Pass:
    """One forward pass: the input it was made with, and what came out.

    Args:
        x: ``[B, *S]``.
        output: what the net gave.
        loss: the mean loss, without penalties.
        losses: the loss of each sample, ``[B]``; None where no one asks for it.
        features: what the net's last linear layer was given, ``[B, d]``; likewise.
        activations: those that penalties name, ``[B, *H]`` each.
        state: of the random numbers before it, where it will be made again with the same ones.
    """

    x: Tensor
    output: Any
    loss: Tensor
    losses: Tensor | None
    features: Tensor | None = None
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    state: RandomState | None = None


def reuses_input_graph(penalty: GradientPenalty) -> bool:
    """Whether an input penalty is taken at the data itself, where the training graph is."""
    at_data = not isinstance(penalty.wrt, weights) and not penalty.at.moves
    return at_data and penalty.estimator.reuses_graph


def takes_the_loss_alone(penalties: Iterable[GradientPenalty]) -> bool:
    """Whether there is one penalty, and it takes the gradient of the loss: a finite difference."""
    first, *others = [*penalties, None]
    return (
        first is not None
        and others == [None]
        and not hasattr(first.weight, "measure")
        and (first.of, first.scope) == ("loss", "batch")
        and isinstance(first.wrt, weights)
        and first.estimator.first_order
        and not first.estimator.reuses_graph
    )


def differentiated(penalty: GradientPenalty, done: Pass) -> Any:
    """Return what a penalty differentiates, of a forward pass that was made."""
    if isinstance(penalty.of, captures.Named):
        return done.activations[penalty.of.name]
    if penalty.of != "loss":
        return done.output
    return done.losses if needs_losses(penalty) else done.loss


def needs_losses(penalty: GradientPenalty) -> bool:
    """Whether a penalty differentiates the loss of each sample."""
    return penalty.of == "loss" and penalty.scope in ("sample", "pixel")


def repeated(y: Any, batch: int, points: int) -> Any:
    """Return the target of a batch for points of which each sample has several, as in a mixture.

    Args:
        y: the target of ``batch`` samples, a tensor or any structure of them.
        batch: the number of samples.
        points: that of the points at which the loss is asked for.

    Returns:
        The target, over and over: ``[points, ...]``.

    Raises:
        ValueError: if the points are not a multiple of the samples.
    """
    if points == batch:
        return y
    if points % batch:
        raise ValueError(
            f'`of="loss"` needs a target for each point, and {points} points are no multiple of '
            f'the batch of {batch}: use of="output", or as many points for every sample'
        )

    def repeat(t: Tensor) -> Tensor:
        return torch.cat([t] * (points // batch)) if t.ndim else t

    return torch.utils._pytree.tree_map_only(Tensor, repeat, y)


def with_features(penalty: GradientPenalty) -> bool:
    """Whether a penalty takes what the last linear layer is given."""
    return isinstance(penalty, EnvironmentPenalty) and penalty.statistic.features


def variable(penalty: GradientPenalty, done: Pass) -> Tensor:
    """Return the variable of a penalty at the data itself, of a forward pass that was made."""
    wrt = penalty.wrt
    return done.activations[wrt.name] if isinstance(wrt, captures.Named) else done.x


def activation_names(penalty: GradientPenalty) -> list[str]:
    """Return the names of the activations that a penalty asks for."""
    return captures.names(penalty.of, penalty.wrt)


def unpack(batch: Any) -> tuple[Tensor, Any]:
    """Return x and y of a batch.

    Args:
        batch: ``(x, y)``, or ``(x, y, env)``.

    Returns:
        x, a tensor, and y.

    Raises:
        TypeError: if it is anything else.
    """
    several = isinstance(batch, (list, tuple)) and len(batch) in (2, 3)
    if not several or not isinstance(batch[0], Tensor):
        raise TypeError(
            "PenalizedModule takes batches (x, y), or (x, y, env), with a tensor x [B, ...]; got "
            f"{type(batch).__name__}: override nothing, use GradientPenalty in a module of your own"
        )
    return batch[0], batch[1]


def environments(batch: Any) -> Tensor:
    """Return the environment of each sample, ``[B]``: two equal halves where a batch has none."""
    if len(batch) == 3:
        return batch[2]
    size = len(batch[0])
    return torch.arange(size, device=batch[0].device) * 2 // size
