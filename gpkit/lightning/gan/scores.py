"""A critic's scores of real and fake samples, and the penalties that are taken on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.isolation import double_backward
from gpkit.autodiff.numerics import wide
from gpkit.axes.at import fake as at_fake
from gpkit.axes.at import real as at_real
from gpkit.lightning.batches import repeated
from gpkit.needs import needs_of
from gpkit.penalty import Penalty


@dataclass(frozen=True)
class Scores:
    """A critic's scores, and what they were made of.

    Args:
        real: x, ``[B, *S]``.
        fake: y, ``[B, *S]``.
        labels: of the samples, or None.
        of_real: D(x), ``[B, ...]``; None where penalties are to make graphs of their own.
        of_fake: D(y), ``[B, ...]``; likewise.
    """

    real: Tensor
    fake: Tensor
    labels: Any
    of_real: Tensor | None = None
    of_fake: Tensor | None = None

    def both(self) -> tuple[Tensor, Tensor]:
        """Return D(x) and D(y), where they are there."""
        assert self.of_real is not None
        assert self.of_fake is not None
        return self.of_real, self.of_fake


def conditioned(net: nn.Module, labels: Any) -> Callable[[Tensor], Any]:
    """Return a net as a function of its first input alone, at points of the batch or a multiple."""
    if labels is None:
        return net
    return lambda x: net(x, repeated(labels, len(labels), len(x)))


def score(critic: nn.Module, x: Tensor, labels: Any) -> Tensor:
    """Return a critic's scores of samples.

    Args:
        critic: ``critic(x)``, or with labels ``critic(x, labels)``.
        x: ``[B, *S]``.
        labels: of the samples, or None.

    Returns:
        ``[B, ...]``, in float32 or better, for the means and differences of a loss.

    Raises:
        ValueError: if they are not scores of samples.
    """
    scores = conditioned(critic, labels)(x)
    if not isinstance(scores, Tensor) or scores.ndim == 0 or len(scores) != len(x):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"the critic must give scores for each of {len(x)} samples, [{len(x)}], "
            f"[{len(x)}, 1] or maps of them; got {got}"
        )
    return scores.to(wide(scores))


def scores_of(
    critic: nn.Module, real: Tensor, fake: Tensor, labels: Any, reusing: Iterable[Penalty]
) -> Scores:
    """Return the scores of a batch, on graphs that some penalties will be taken on.

    Args:
        critic: D.
        real: x, ``[B, *S]``.
        fake: y, ``[B, *S]``.
        labels: of the samples, or None.
        reusing: penalties of `samples_reused` that will be.

    Returns:
        The scores.
    """
    reusing = list(reusing)
    at = {samples_reused(penalty) for penalty in reusing}
    if "real" in at:
        real = real.detach().requires_grad_()  # the batch's own tensor stays as it is
    if "fake" in at:
        fake = fake.detach().requires_grad_()
    order = max((needs_of(penalty).order for penalty in reusing), default=0)
    with double_backward(order) if order else nullcontext():
        of_real, of_fake = score(critic, real, labels), score(critic, fake, labels)
    return Scores(real, fake, labels, of_real, of_fake)


def samples_reused(penalty: Penalty) -> str:
    """Return which samples' scores a penalty can be taken on, as R1 and R2 can.

    Returns:
        "real", "fake", or "" if it needs a forward pass of its own.
    """
    needs, at = needs_of(penalty), penalty.axes().get("at")
    if not needs.input_graph or needs.activations:
        return ""
    return "fake" if isinstance(at, at_fake) else "real" if isinstance(at, at_real) else ""
