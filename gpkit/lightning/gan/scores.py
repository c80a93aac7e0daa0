"""The critic's scores of real and fake samples, and which penalties reuse their graph."""

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
    """Real and fake samples, and the critic's scores of them.

    Args:
        real: real samples x, ``[B, *S]``.
        fake: fake samples y, ``[B, *S]``.
        labels: of the samples, or None.
        of_real: D(x), ``[B, ...]``; None if penalties must run the critic themselves.
        of_fake: D(y), ``[B, ...]``; None in the same case.
    """

    real: Tensor
    fake: Tensor
    labels: Any
    of_real: Tensor | None = None
    of_fake: Tensor | None = None

    def both(self) -> tuple[Tensor, Tensor]:
        """Return D(x) and D(y), which must be there."""
        assert self.of_real is not None
        assert self.of_fake is not None
        return self.of_real, self.of_fake


def conditioned(net: nn.Module, labels: Any) -> Callable[[Tensor], Any]:
    """Return a net as a function of its first input alone.

    Args:
        net: ``net(x)``, or with labels ``net(x, labels)``.
        labels: ``[B, ...]`` or None. They are repeated if x has a multiple of B points.

    Returns:
        A function ``x -> net output``.
    """
    if labels is None:
        return net
    return lambda x: net(x, repeated(labels, len(labels), len(x)))


def score(critic: nn.Module, x: Tensor, labels: Any) -> Tensor:
    """Return the critic's scores of samples.

    Args:
        critic: ``critic(x)``, or with labels ``critic(x, labels)``.
        x: ``[B, *S]``.
        labels: of the samples, or None.

    Returns:
        The scores, ``[B, ...]``, in float32 or better: a loss takes means and differences of them.

    Raises:
        ValueError: if the critic does not return at least one score per sample.
    """
    scores = conditioned(critic, labels)(x)
    if not isinstance(scores, Tensor) or scores.ndim == 0 or len(scores) != len(x):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"the critic must return scores of each of {len(x)} samples, [{len(x)}], "
            f"[{len(x)}, 1] or [{len(x)}, ...]; got {got}: change the critic"
        )
    return scores.to(wide(scores))


def scores_of(
    critic: nn.Module, real: Tensor, fake: Tensor, labels: Any, reusing: Iterable[Penalty]
) -> Scores:
    """Return the scores of a batch, with a graph that some penalties will differentiate.

    Args:
        critic: D.
        real: real samples x, ``[B, *S]``.
        fake: fake samples y, ``[B, *S]``.
        labels: of the samples, or None.
        reusing: the penalties that reuse the graph, see `samples_reused`. The samples that they
            need require grad in the result, and the critic runs on kernels that they can
            differentiate.

    Returns:
        The scores.
    """
    reusing = list(reusing)
    at = {samples_reused(penalty) for penalty in reusing}
    if "real" in at:
        real = real.detach().requires_grad_()  # not the batch's own tensor
    if "fake" in at:
        fake = fake.detach().requires_grad_()
    order = max((needs_of(penalty).order for penalty in reusing), default=0)
    with double_backward(order) if order else nullcontext():
        of_real, of_fake = score(critic, real, labels), score(critic, fake, labels)
    return Scores(real, fake, labels, of_real, of_fake)


def samples_reused(penalty: Penalty) -> str:
    """Return the samples whose scores a penalty can differentiate, such as "real" for R1.

    Returns:
        "real" or "fake"; "" if the penalty needs a forward pass of its own.
    """
    needs, at = needs_of(penalty), penalty.axes().get("at")
    if not needs.input_graph or needs.activations:
        return ""
    return "fake" if isinstance(at, at_fake) else "real" if isinstance(at, at_real) else ""
