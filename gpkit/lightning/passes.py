"""A forward pass, and what each penalty differentiates of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
    """

    x: Tensor
    output: Any
    loss: Tensor
    losses: Tensor | None


def reuses_input_graph(penalty: GradientPenalty) -> bool:
    """Whether an input penalty is taken at the data itself, where the training graph is."""
    at_data = not isinstance(penalty.wrt, weights) and not penalty.at.moves
    return at_data and penalty.estimator.reuses_graph


def differentiated(penalty: GradientPenalty, done: Pass) -> Any:
    """Return what a penalty differentiates, of a forward pass that was made."""
    if penalty.of != "loss":
        return done.output
    return done.losses if penalty.scope == "sample" else done.loss


def unpack(batch: Any) -> tuple[Tensor, Any]:
    """Return x and y of a batch.

    Args:
        batch: ``(x, y)``.

    Returns:
        x, a tensor, and y.

    Raises:
        TypeError: if it is anything else.
    """
    if not isinstance(batch, (list, tuple)) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise TypeError(
            "PenalizedModule takes batches (x, y) with a tensor x [B, ...]; got "
            f"{type(batch).__name__}: override nothing, use GradientPenalty in a module of your own"
        )
    return batch[0], batch[1]
