"""The loss of a batch and of each sample, and what its errors mean."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.compat import tree_leaves
from gpkit.axes.given.sample_weight import of_entries, of_samples, weighs_steps

LossFunction = Callable[..., Tensor]


def per_sample(loss: LossFunction) -> LossFunction:
    """Turn a loss into a function that returns the loss of each sample, ``[B]``.

    A loss with a ``reduction`` (an ``nn`` module, a function of ``torch.nn.functional``, or a
    partial of one) is called with "none"; dimensions after the first are averaged. Of any other
    loss, an output ``[B]`` is taken for the losses of the samples. One number L is taken for their
    mean, and every sample gets L. Then the sum over samples is right, B·L, and so is each sample's
    input gradient, but the single values are not.

    Args:
        loss: ``(output, target) -> loss``.

    Returns:
        A function ``(output, target, weights=None) -> losses``, with losses ``[B]``. With weights
        ``[B, T]`` of the entries after the first dimension, a loss is Σ_t w_t ℓ_t / Σ_t w_t.
    """
    if isinstance(loss, nn.Module) and has_reduction(loss):
        unreduced = copy.copy(loss)
        unreduced.reduction = "none"  # type: ignore[assignment]
        loss = unreduced
    elif has_reduction(loss):
        loss = functools.partial(loss, reduction="none")

    return functools.partial(_losses, loss)  # a partial, unlike a closure, can be pickled


def as_loss(loss: Any) -> LossFunction:
    """Return a loss that says in one line what does not fit.

    Raises:
        TypeError: if it is a class, or no function.
    """
    checks.an_object("loss=...", loss)
    if not callable(loss):
        raise TypeError(f"`loss=...` must be a function (output, y) -> loss; got {loss!r}")
    return loss


def taken(loss: LossFunction, output: Any, target: Any) -> Tensor:
    """Return ``loss(output, target)``.

    Raises:
        ValueError: if the loss raised an error, with the shapes, and the labels that it takes.
    """
    try:
        return loss(output, target)
    except (RuntimeError, ValueError, IndexError) as error:
        said = f"({type(error).__name__}: {str(error).splitlines()[0]})"
        raise ValueError(f"{_misfit(loss, output, target)} {said}") from error


def _misfit(loss: LossFunction, output: Any, target: Any) -> str:
    """Return what may be wrong with an output and a target for a loss."""
    name = getattr(loss, "__name__", type(loss).__name__)
    got = f"the loss {name} failed"
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return f"{got} for an output {type(output).__name__} and a target {type(target).__name__}"
    shapes = f"for outputs {list(output.shape)} and targets {list(target.shape)}, {target.dtype}"
    classes = output.shape[1] if output.ndim > 1 else 0
    if "cross" in name.lower() and "binary" not in name.lower() and classes:
        if target.is_floating_point() and target.ndim < output.ndim:
            return f"{got} {shapes}: labels are class indices, y.long()"
        labels = target[target != getattr(loss, "ignore_index", -100)].unique().tolist()
        if labels and not 0 <= labels[0] <= labels[-1] < classes:
            return (
                f"{got} {shapes}: the {classes} outputs of the net are for labels 0 to "
                f"{classes - 1}; got labels from {labels[0]:g} to {labels[-1]:g}: give the net an "
                "output for each class"
            )
    if output.shape != target.shape and output.numel() == target.numel():
        return f"{got} {shapes}: give both the same shape, output.squeeze(1) or y[:, None]"
    return f"{got} {shapes}"


def has_reduction(loss: LossFunction) -> bool:
    """Whether a loss can be asked for the loss of each entry, as those of torch can."""
    own = isinstance(loss, nn.Module) and hasattr(loss, "reduction")
    return own or "reduction" in _parameters(loss)


def logits(output: Any) -> Any:
    """Return the ``logits`` of an output that has them, as Hugging Face's have; else the output."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else None
    found = getattr(output, "logits", None) if found is None else found
    return output if found is None else found


def _losses(loss: LossFunction, output: Any, target: Any, weights: Tensor | None = None) -> Tensor:
    value = taken(loss, output, target)
    if value.ndim == 0 and weights is None:
        return value.expand(_batch_size(output, target))
    return of_each_sample(value, weights, "use a loss with a `reduction`")


def of_each_sample(losses: Tensor, weights: Tensor | None, advice: str) -> Tensor:
    """Return the loss of each sample ``[B]``: the mean of its steps ``[B, *T]``.

    Args:
        losses: ``[B]`` or ``[B, *T]``.
        weights: of the steps, ``[B, T]``: then it is Σ_t w_t ℓ_t / Σ_t w_t, or 0 without a step.
        advice: what to do if there are no losses of steps.

    Returns:
        The losses.

    Raises:
        ValueError: if there are weights of steps, and no losses of them.
    """
    if weights is None:
        return losses if losses.ndim == 1 else losses.flatten(1).mean(1)
    if not weighs_steps(weights, tuple(losses.shape)):
        raise ValueError(
            "sample_weight= of steps, [B, T], needs the loss of each step; got weights "
            f"{list(weights.shape)} and losses {list(losses.shape)}: {advice}, or weights [B]"
        )
    summed, _ = of_samples(losses, weights)
    total = of_entries(weights, losses).to(summed).reshape(len(losses), -1).sum(1)
    return summed / torch.where(total == 0, torch.ones_like(total), total)


def _batch_size(*values: Any) -> int:
    """Return the length of the first tensor with a dimension, in nested structures."""
    found = (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.ndim)
    return len(next(found))


def _parameters(function: LossFunction) -> list[str]:
    """Return the names of a function's parameters; an empty list if it has no signature."""
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:
        return []
