"""The evaluation of a penalty: what it was called with becomes targets, and these its terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpkit import graphs
from gpkit.calls import Call, Computed
from gpkit.targets import Target
from gpkit.terms import Terms

if TYPE_CHECKING:
    from gpkit.penalty import GradientPenalty


def evaluate(
    penalty: GradientPenalty,
    f: Any,
    args: tuple[Any, ...],
    real: Any,
    fake: Any,
    weight: float,
    scale: Tensor | float | None = None,
    *,
    observe: bool = False,
) -> tuple[Terms, list[Target]]:
    """Return the terms of a penalty, and the targets that they are of.

    Args:
        penalty: what is evaluated.
        f: what it was called with, and
        args: what followed it.
        real: real samples, if given by keyword.
        fake: fake samples, if given by keyword.
        weight: the factor of the reduced value.
        scale: of a gradient scaler.
        observe: whether its state takes the norms in.

    Returns:
        The terms and the targets.

    Raises:
        RuntimeError: if there is no graph to differentiate, or one that torch cannot.
    """
    train = torch.is_grad_enabled()
    args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)  # net.parameters()
    seed = penalty.next_seed()
    with nullcontext() if train and not torch.is_inference_mode_enabled() else differentiable():
        rng = torch.Generator(device_of(f, args, real, fake)).manual_seed(seed)
        twice = not penalty.estimator.first_order
        axes = (penalty.of, penalty.at, penalty.scope, rng, seed, penalty.order, twice)
        call = Call(f, args, real, fake, *axes)
        targets = list(penalty.wrt.targets(call))
        for target in targets:
            if not target.y.requires_grad:
                raise RuntimeError(
                    "the penalty has nothing to differentiate: what it was given has no graph. "
                    "Was it computed under no_grad, detached, or made by a gradient without "
                    "create_graph=True?"
                )
        if twice and not penalty.seen_to_act:
            graphs.require_derivatives(targets[0].y, targets[0].xs, penalty.order)
        terms = penalty.terms_of(targets, rng, weight, scale, observe=observe)
    return terms if train else terms.detached(), targets


@contextmanager
def differentiable() -> Iterator[None]:
    """Let graphs be made, whatever mode is on."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def device_of(*values: Any) -> torch.device:
    """Return the device of the first tensor or module among ``values``, else the CPU."""
    for value in values:
        if isinstance(value, Computed):
            value = value.value
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, nn.Module):
            value = [next(value.parameters(), None)]
        if isinstance(value, (list, tuple)):
            found = device_of(*value)
            if found.type != "cpu":
                return found
    return torch.device("cpu")
