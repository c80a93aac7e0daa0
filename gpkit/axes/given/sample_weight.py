"""Weights of the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.tracing.calls import holds
from gpkit.axes.of import require_losses


def sample_weights(given: Any, batch: int, pixels: int = 1) -> Tensor:
    """Return weights as ``[batch·pixels]``.

    Args:
        given: ``[batch]``, or ``[batch, 1]``; with pixels one for each of them as well.
        batch: the number of samples.
        pixels: the number of pixels of a sample that have a norm each.

    Returns:
        The weights.

    Raises:
        ValueError: if there is not one for each sample, or one of them is negative.
        TypeError: if they are no tensor.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"sample_weight= must be a tensor [B]; got a {type(given).__name__}")
    if given.ndim == 0 or len(given) != batch or given.numel() not in (batch, batch * pixels):
        raise ValueError(
            f"sample_weight= must have one number for each sample, [{batch}], or with of='loss' "
            f"for each step of losses [{batch}, T]; got {list(given.shape)}"
        )
    require_positive(given)
    weights = given.reshape(-1)
    return weights if len(weights) == batch * pixels else weights.repeat_interleave(pixels)


def require_positive(weights: Tensor) -> None:
    """Refuse negative weights; only on a CPU, where a look at them costs nothing.

    Raises:
        ValueError: if there are any.
    """
    if weights.device.type != "cpu" or holds(lambda: (weights >= 0).all()):
        return
    if bool((weights < 0).any()):
        raise ValueError(
            f"sample_weight= must be >= 0; got {float(weights.min()):g}: use 0 to leave a sample "
            "out"
        )


def of_samples(losses: Tensor, weights: Any = None) -> tuple[Tensor, tuple[int, ...]]:
    """Return the loss of each sample ``[B]``: the sum over its steps, Σ_t w_t l_t.

    Args:
        losses: ``[B, *T]``; ``[B]`` and ``[B, 1]`` are returned as they are.
        weights: of the steps, ``[B, *T]`` or its first dimensions; others weigh samples.

    Returns:
        The losses of the samples, and the shape of the losses of steps; () if there are none.

    >>> import gpkit
    >>> x, mask = torch.ones(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])  # two steps, and none
    >>> gpkit.input_grad_norm()(lambda x: 5 * x, x, sample_weight=mask).item()  # 5² + 5²
    50.0
    """
    steps = tuple(losses.shape)
    if losses.ndim < 2 or losses.numel() == len(losses):
        return losses, ()
    require_losses(losses)
    if weighs_steps(weights, steps):
        w = of_entries(weights, losses).to(losses).reshape(steps)
        losses = torch.where(w == 0, 0.0, losses) * w
    return losses.flatten(1).sum(1), steps


def of_entries(weights: Any, losses: Tensor) -> Tensor:
    """Return the weight of each entry ``[N]`` of losses ``[B, *T]``: its step's or its sample's.

    Raises:
        ValueError: if the shape does not fit, or a weight is negative.
    """
    if not weighs_steps(weights, tuple(losses.shape)):
        return sample_weights(weights, len(losses), losses[0].numel())
    require_positive(weights)
    shape = *weights.shape, *[1] * (losses.ndim - weights.ndim)
    return weights.reshape(shape).expand(losses.shape).reshape(-1)


def weighs_steps(weights: Any, steps: tuple[int, ...]) -> bool:
    """Whether weights are those of the steps of losses ``[B, *T]``."""
    return has_steps(weights) and tuple(weights.shape) == steps[: weights.ndim]


def has_steps(weights: Any) -> bool:
    """Whether weights are ``[B, T]``, and not one for each sample."""
    several = isinstance(weights, Tensor) and weights.ndim > 1
    return several and weights.numel() != len(weights)


def kept(weights: Tensor) -> Tensor:
    """Return which samples have a step that counts ``[B]``, from weights of steps ``[B, *T]``.

    >>> kept(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    tensor([1., 0.])
    """
    return (weights != 0).flatten(1).any(1).to(torch.get_default_dtype())


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return Σ w v / Σ w over the first dimension; zero if all weights are zero.

    >>> weighted_mean(torch.tensor([1.0, 5.0, torch.inf]), torch.tensor([1.0, 3.0, 0.0]))
    tensor(4.)
    """
    total = weights.to(values).sum()
    return weighted_sum(values, weights) / torch.where(total == 0, torch.ones_like(total), total)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return Σ w v over the first dimension; values whose weight is zero may be infinite."""
    weights = weights.to(values).reshape(-1, *[1] * (values.ndim - 1))
    return (torch.where(weights == 0, 0.0, values) * weights).sum(0)
