"""What the critic and the generator are trained on: a loss and penalties on one micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.formula import Terms
from gpkit.lightning.gan.ema import frozen
from gpkit.lightning.gan.losses import GANLoss
from gpkit.lightning.gan.scores import Scores, conditioned, samples_reused, score, scores_of
from gpkit.needs import needs_of
from gpkit.penalty import Penalty
from gpkit.sums import PenaltySum

MicroBatch = tuple[Tensor, Any]  # real samples [B, *S], and their labels or None


@dataclass(frozen=True)
class Objective:
    """What one net is trained on, evaluated on one micro-batch.

    Args:
        total: the loss plus its penalties, one number; None if there is nothing to train on.
        terms: of the penalties by name; None for a penalty that does not act on this step.
        loss: without penalties; None if this is a step on the penalties alone.
        scores: the critic's scores; None unless this is the critic's loss.
    """

    total: Tensor | None
    terms: dict[str, Terms | None]
    loss: Tensor | None = None
    scores: Scores | None = None


@dataclass(frozen=True)
class Objectives:
    """A generator G and a critic D, with their loss and penalties.

    Args:
        generator: G.
        critic: D.
        loss: of both nets.
        penalties: of the critic.
        generator_penalties: of the generator.
        latents: draws latents: ``n -> [n, latent_dim]``.
        penalty_steps: whether penalties have steps of their own.
        full_precision: whether penalties are evaluated without autocast, in forward passes of their
            own. Under float16 their inner gradient would vanish, since no scaler scales it.
    """

    generator: nn.Module
    critic: nn.Module
    loss: GANLoss
    penalties: PenaltySum
    generator_penalties: PenaltySum
    latents: Callable[[int], Tensor]
    penalty_steps: bool = False
    full_precision: bool = False

    def critic_objective(self, micro: MicroBatch, step: int) -> Objective:
        """Return the critic's loss, plus its penalties unless they have steps of their own.

        Args:
            micro: a micro-batch.
            step: the number of the critic's step.

        Returns:
            The objective.
        """
        (real, labels), fake = micro, self.fakes(micro)
        penalties = PenaltySum({}) if self.penalty_steps else self.penalties
        reusing = [p for p in penalties.values() if samples_reused(p) and p.acts_at(step)]
        apart = self.full_precision
        scores = scores_of(self.critic, real, fake, labels, [] if apart else reusing)
        loss = self.loss.critic(*scores.both())
        on = Scores(real, fake, labels) if apart else scores
        terms = self._act(penalties, on, step)
        total = penalties.total(loss, terms, self.critic.parameters)
        return Objective(total, terms, loss, scores)

    def critic_penalties_alone(self, micro: MicroBatch, step: int) -> Objective:
        """Return the critic's penalties alone; the arguments are those of `critic_objective`."""
        real, labels = micro
        acting = any(p.acts_at(step) for p in self.penalties.values())
        fake = self.fakes(micro) if acting else real  # unused if none acts
        terms = self._act(self.penalties, Scores(real, fake, labels), step)
        return Objective(self.penalties.total(None, terms, self.critic.parameters), terms)

    def generator_objective(self, micro: MicroBatch, step: int) -> Objective:
        """Return the generator's loss, plus its penalties unless they have steps of their own.

        Args:
            micro: a micro-batch. Its real samples are used by losses in pairs only.
            step: the number of the generator's step.

        Returns:
            The objective.
        """
        z = self.latents(len(micro[0]))
        loss = self.generator_loss(micro, z)
        penalties = PenaltySum({}) if self.penalty_steps else self.generator_penalties
        terms = self._act_on_generator(penalties, micro, z, step)
        return Objective(penalties.total(loss, terms, self.generator.parameters), terms, loss)

    def generator_penalties_alone(self, micro: MicroBatch, step: int) -> Objective:
        """Return the generator's penalties alone; arguments as in `generator_objective`."""
        z = self.latents(len(micro[0]))
        terms = self._act_on_generator(self.generator_penalties, micro, z, step)
        total = self.generator_penalties.total(None, terms, self.generator.parameters)
        return Objective(total, terms)

    def generator_loss(self, micro: MicroBatch, z: Tensor) -> Tensor:
        """Return the generator's loss, one number. It has no gradient in the critic's weights."""
        real, labels = micro
        with frozen(self.critic):
            fake = generate(self.generator, z, real, labels)
            real_scores = score(self.critic, real, labels) if self.loss.paired else None
            return self.loss.generator(real_scores, score(self.critic, fake, labels))

    def fakes(self, micro: MicroBatch) -> Tensor:
        """Return as many fake samples as there are real ones, without a graph: ``[B, *S]``."""
        real, labels = micro
        z = self.latents(len(real))
        with torch.no_grad():
            return generate(self.generator, z, real, labels)

    def _act(self, penalties: PenaltySum, scores: Scores, step: int) -> dict[str, Terms | None]:
        with self._precision(scores.real.device):
            return {name: self._act_on(p, scores, step) for name, p in penalties.items()}

    def _act_on(self, penalty: Penalty, scores: Scores, step: int) -> Terms | None:
        """Evaluate one penalty of the critic, on the graph of the scores if it can reuse that."""
        real, fake, labels, critic = scores.real, scores.fake, scores.labels, self.critic
        needs, reused = needs_of(penalty), samples_reused(penalty)
        if needs.in_weights:

            def closure() -> Tensor:
                return self.loss.critic(score(critic, real, labels), score(critic, fake, labels))

            if scores.of_real is None or not needs.reuses_graph:
                return penalty.act(closure, critic, step=step)
            return penalty.act(self.loss.critic(*scores.both()), critic, step=step)
        if scores.of_real is not None and reused == "real":
            return penalty.act(scores.of_real, real=real, step=step)
        if scores.of_fake is not None and reused == "fake":
            return penalty.act(scores.of_fake, fake=fake, step=step)
        net = [critic] if needs.activations else []
        return penalty.act(conditioned(critic, labels), *net, real=real, fake=fake, step=step)

    def _act_on_generator(
        self, penalties: PenaltySum, micro: MicroBatch, z: Tensor, step: int
    ) -> dict[str, Terms | None]:
        with self._precision(z.device):
            return {name: self._act_on_latents(p, micro, z, step) for name, p in penalties.items()}

    def _act_on_latents(
        self, penalty: Penalty, micro: MicroBatch, z: Tensor, step: int
    ) -> Terms | None:
        """Evaluate one penalty of the generator."""
        needs = needs_of(penalty)
        if needs.in_weights:
            return penalty.act(lambda: self.generator_loss(micro, z), self.generator, step=step)
        net = [self.generator] if needs.activations else []
        return penalty.act(conditioned(self.generator, micro[1]), z, *net, step=step)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, enabled=False) if self.full_precision else nullcontext()


def generate(generator: nn.Module, z: Tensor, real: Tensor, labels: Any) -> Tensor:
    """Return the generator's samples for latents, with the dtype of the real samples.

    Args:
        generator: ``generator(z)``, or with labels ``generator(z, labels)``.
        z: latents, ``[B, latent_dim]``.
        real: real samples, ``[B, *S]``.
        labels: of the samples, or None.

    Returns:
        Fake samples, ``[B, *S]``.

    Raises:
        ValueError: if its output does not have the shape of the real samples.
    """
    fake = conditioned(generator, labels)(z)
    if not isinstance(fake, Tensor) or fake.shape != real.shape:
        got = list(fake.shape) if isinstance(fake, Tensor) else type(fake).__name__
        raise ValueError(
            f"the generator must return samples of the shape of the data, {list(real.shape)}; "
            f"got {got}: change the generator or the data"
        )
    return fake.to(real.dtype)
