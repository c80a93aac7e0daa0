"""A penalty of the batch's loss in the weights, and no other: a step is one of `with_loss`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.isolation import double_backward
from gpkit.autodiff.random import has_ranks
from gpkit.formula import Terms
from gpkit.lightning.batches import Batch
from gpkit.lightning.module.forward import ForwardPass, ForwardRunner
from gpkit.losses import LossFunction
from gpkit.needs import Needs
from gpkit.sums import PenaltySum
from gpkit.with_loss import Losses, with_loss


def is_alone(needs: Mapping[str, Needs]) -> bool:
    """Whether there is one penalty, and it is of the batch's loss in the weights."""
    if len(needs) != 1:
        return False
    (own,) = needs.values()
    others = own.pooled, own.own_forward, own.given, own.measures, own.takes_part
    once = own.in_weights and own.of_loss and not (any(others) or own.activations)
    return once and (own.reuses_graph or own.loss_at_two_points)


def fits(batch: Batch) -> bool:
    """Whether a step with a batch is one of `with_loss`: the net has one input, a tensor."""
    kind = batch.x.device.type
    plain = batch.alone and torch.is_grad_enabled() and not torch.is_autocast_enabled(kind)
    return plain and not has_ranks()


def penalised(
    penalties: PenaltySum,
    needs: Mapping[str, Needs],
    net: nn.Module,
    losses: tuple[LossFunction, LossFunction],
    batch: Batch,
    step: int | None,
) -> tuple[Tensor, ForwardPass, dict[str, Terms | None]]:
    """Return the total loss, the forward pass, and the terms of the penalty, and count a step.

    Args:
        penalties: with one, which `is_alone`.
        needs: of the penalty.
        net: the net.
        losses: ``(output, y) -> loss``, and the same that returns the losses of samples.
        batch: that `fits`.
        step: the optimiser step; None counts the calls.
    """
    ((name, penalty),) = penalties.items()
    each, order = needs[name].sample_losses, needs[name].order
    closure = partial(losses_of, net, *losses, batch.x, batch.y, each, order)
    taken, scale = with_loss([penalty], closure, net, step), penalties.loss_scale()
    total = taken.total if scale == 1 else taken.total / scale
    return total, ForwardPass(batch.x, None, taken.loss), {name: taken.terms()}


def losses_of(
    net: nn.Module,
    loss: LossFunction,
    sample_losses: LossFunction,
    x: Tensor,
    y: Any,
    each: bool,
    order: int,
) -> Tensor | Losses:
    """Return the mean loss of a batch, by the same code at each step.

    Args:
        net: the net.
        loss: ``(output, y) -> loss``.
        sample_losses: ``(output, y) -> losses``, ``[B]``.
        x: the input.
        y: the target.
        each: whether to return the losses of samples as well.
        order: k if kernels need a double backward, else 0.
    """
    runner = ForwardRunner(net, loss, sample_losses)
    with double_backward(order) if order else nullcontext():
        forward = runner.passed(x, y, {}, per_sample=each)
    return forward.loss if forward.losses is None else Losses(forward.losses, forward.loss)
