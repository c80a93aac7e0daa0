"""A critic's scores of real and fake samples, and the penalties that are taken on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import captures
from gpkit.isolation import double_backward
from gpkit.lightning.gan.losses import GANLoss
from gpkit.lightning.gan.modes import frozen
from gpkit.lightning.passes import repeated
from gpkit.penalty import GradientPenalty
from gpkit.points import fake as at_fake
from gpkit.points import real as at_real
from gpkit.targets import wide
from gpkit.terms import Terms
from gpkit.variables import inputs, weights


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
    critic: nn.Module, real: Tensor, fake: Tensor, labels: Any, reusing: Iterable[GradientPenalty]
) -> Scores:
    """Return the scores of a batch, on graphs that some penalties will be taken on.

    Args:
        critic: D.
        real: x, ``[B, *S]``.
        fake: y, ``[B, *S]``.
        labels: of the samples, or None.
        reusing: penalties of `reuses_graph` that will be.

    Returns:
        The scores.
    """
    reusing = list(reusing)
    if any(isinstance(p.at, at_real) for p in reusing):
        real = real.detach().requires_grad_()  # the batch's own tensor stays as it is
    if any(isinstance(p.at, at_fake) for p in reusing):
        fake = fake.detach().requires_grad_()
    order = max((p.order for p in reusing), default=0)
    with double_backward(order) if reusing else nullcontext():
        of_real, of_fake = score(critic, real, labels), score(critic, fake, labels)
    return Scores(real, fake, labels, of_real, of_fake)


def reuses_graph(penalty: GradientPenalty) -> bool:
    """Whether a penalty can be taken on the scores themselves: R1 and R2, and what is like them."""
    return (
        type(penalty.wrt) is inputs
        and isinstance(penalty.at, (at_real, at_fake))
        and penalty.estimator.reuses_graph
        and not captures.names(penalty.of, penalty.wrt)
    )


def act(
    penalty: GradientPenalty,
    critic: nn.Module,
    loss: GANLoss,
    scores: Scores,
    step: int,
) -> Terms | None:
    """Return the terms of a critic's penalty, or None where it skips the step.

    Args:
        penalty: in the inputs of the critic, or in its weights.
        critic: D.
        loss: whose critic part a penalty in the weights differentiates.
        scores: of the batch.
        step: the critic's own step.

    Returns:
        The terms.
    """
    real, fake, labels = scores.real, scores.fake, scores.labels
    of_real, of_fake = scores.of_real, scores.of_fake
    if isinstance(penalty.wrt, weights):

        def closure() -> Tensor:
            return loss.critic(score(critic, real, labels), score(critic, fake, labels))

        if of_real is None or of_fake is None or not penalty.estimator.reuses_graph:
            return penalty.act(closure, critic, step=step)
        return penalty.act(loss.critic(of_real, of_fake), critic, step=step)
    if of_real is not None and reuses_graph(penalty):
        if isinstance(penalty.at, at_fake):
            return penalty.act(of_fake, fake=fake, step=step)
        return penalty.act(of_real, real=real, step=step)
    net = [critic] if captures.names(penalty.of, penalty.wrt) else []
    return penalty.act(conditioned(critic, labels), *net, real=real, fake=fake, step=step)


def generator_loss(
    generator: nn.Module, critic: nn.Module, loss: GANLoss, z: Tensor, real: Tensor, labels: Any
) -> Tensor:
    """Return a generator's loss, which trains the generator alone.

    Args:
        generator: G.
        critic: D.
        loss: whose generator part is taken.
        z: latents, ``[B, latent_dim]``.
        real: x, ``[B, *S]``, which some losses compare with.
        labels: of the samples, or None.

    Returns:
        One number.
    """
    with frozen(critic):
        fake = generated(generator, z, real, labels)
        of_real = score(critic, real, labels) if loss.paired else None
        return loss.generator(of_real, score(critic, fake, labels))


def act_on_generator(
    penalty: GradientPenalty,
    generator: nn.Module,
    closure: Callable[[], Tensor],
    z: Tensor,
    labels: Any,
    step: int,
) -> Terms | None:
    """Return the terms of a generator's penalty, or None where it skips the step.

    Args:
        penalty: in the latents, or in the generator's weights.
        generator: G.
        closure: gives its loss, for a penalty in the weights.
        z: latents, ``[B, latent_dim]``.
        labels: of the samples, or None.
        step: the generator's own step.

    Returns:
        The terms.
    """
    if isinstance(penalty.wrt, weights):
        return penalty.act(closure, generator, step=step)
    net = [generator] if captures.names(penalty.of, penalty.wrt) else []
    return penalty.act(conditioned(generator, labels), z, *net, step=step)


def generated(generator: nn.Module, z: Tensor, real: Tensor, labels: Any) -> Tensor:
    """Return what a generator makes of latents, in the dtype of real samples of the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    fake = conditioned(generator, labels)(z)
    if not isinstance(fake, Tensor) or fake.shape != real.shape:
        got = list(fake.shape) if isinstance(fake, Tensor) else type(fake).__name__
        raise ValueError(
            f"the generator must give samples of the shape of the data, {list(real.shape)}; "
            f"got {got}"
        )
    return fake.to(real.dtype)


def penalised(
    loss: Tensor | None,
    terms: Mapping[str, Terms | None],
    penalties: Mapping[str, GradientPenalty],
    net: nn.Module,
) -> Tensor | None:
    """Return the loss and its penalties as one number, and let weights that adapt measure them.

    Args:
        loss: without penalties; None where they have a step of their own.
        terms: by name; None where a penalty skips the step.
        penalties: by the same names.
        net: whose parameters are trained.

    Returns:
        The sum, divided by the greatest scale that a `rescaled` weight asks for; None if there is
        nothing to add up.
    """
    acting = {name: t for name, t in terms.items() if t is not None}
    for name, term in acting.items():
        measure = getattr(penalties[name].weight, "measure", None)
        if measure is not None and loss is not None:
            measure(loss, term.penalty, net.parameters(), penalties[name].step - 1)
    parts = [*([] if loss is None else [loss]), *(t.penalty for t in acting.values())]
    if not parts:
        return None
    total = torch.stack([part.to(parts[0].dtype) for part in parts]).sum()
    scale = max((penalties[name].loss_scale() for name in terms), default=1.0)
    return total if scale == 1 else total / scale
