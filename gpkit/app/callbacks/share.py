"""Which samples of a batch, or which penalty, give a loss or a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.compat import tree_leaves
from gpkit.lightning.evaluation.base import losses_of, read_batch
from gpkit.lightning.module import PenalizedModule

MOST = 512  # samples whose gradients are looked at, one after the other


def bad_samples(batch: Any) -> str:
    """Return how many samples of a batch hold a value that is not finite; "" if none does."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim]
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating:
        return ""
    size = len(floating[0])
    bad = torch.zeros(size, dtype=torch.bool, device=floating[0].device)
    for t in floating:
        if len(t) == size:
            bad |= ~t.reshape(size, -1).isfinite().all(1)
    return f"{int(bad.sum())} of {size} samples of the batch" if bad.any() else ""


def bad_losses(module: Any, batch: Any) -> str:
    """Return how many samples of a batch have a loss that is not finite; "" if none has.

    It runs the forward again, so it is for a run that stops.

    Args:
        module: that was trained; of anything but a `PenalizedModule` the losses are not known.
        batch: of its training data.
    """
    if type(module) is not PenalizedModule:
        return ""
    with torch.no_grad():
        losses = losses_of(module, read_batch(module, batch))
    bad = int((~losses.isfinite()).sum())
    return f" (the losses of {bad} of {len(losses)} samples)" if bad else ""


def bad_gradients(module: Any, batch: Any) -> str:
    """Return whose gradients in the weights are not finite: of samples, or of a penalty.

    It runs each sample by itself in eval mode, so it is for a run that stops. In one graph the bad
    ones would spoil all: 0 · ∞ is NaN.

    Args:
        module: that was trained; of anything but a `PenalizedModule` the parts are not known.
        batch: of its training data.

    Returns:
        The share of the samples, or the name of the penalty; "" if all are finite.
    """
    if type(module) is not PenalizedModule:
        return ""
    weights = [p for p in module.net.parameters() if p.requires_grad]
    read = read_batch(module, batch)
    size = min(MOST, len(read.x))
    module.eval()
    samples = (read.map(itemgetter(slice(i, i + 1))) for i in range(size))
    bad = sum(not all_finite(_gradients(losses_of(module, one), weights)) for one in samples)
    module.train()
    if bad:
        return f": that of the losses of {bad} of {size} samples"
    keys: dict[str, Any] = {"inputs": module.inputs, "target": module.target}
    for name, penalty in module.penalties.items():
        alone = PenalizedModule(module.net, module.loss, {name: penalty}, **keys)
        penalty.step = module.trainer.global_step
        if not all_finite(_gradients(alone.penalized_loss(batch), weights)):
            return f": that of penalty/{name}"
    return ""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are finite."""
    dense = [t.detach() for t in tensors if not t.is_sparse]
    return bool(torch.nn.utils.get_total_norm(dense, torch.inf).isfinite())


def _gradients(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss.sum(), weights, retain_graph=True, allow_unused=True)
    return [g for g in grads if g is not None]
