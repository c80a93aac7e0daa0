"""What the critic and the generator are trained on: a loss and penalties of one batch."""

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

Micro = tuple[Tensor, Any]  # a batch: samples [B, *S], and their labels or None
AllTerms = dict[str, Terms | None]


@dataclass(frozen=True)
class Objective:
    """What a net is trained on, for one batch.

    Args:
        total: the loss and its penalties, one number; None where there is nothing to train on.
        terms: of the penalties, by name; None for one that skips the step.
        loss: without penalties; None where penalties have a step of their own.
        scores: of the critic, where they were made.
    """

    total: Tensor | None
    terms: AllTerms
    loss: Tensor | None = None
    scores: Scores | None = None


@dataclass(frozen=True)
class Objectives:
    """A generator and a critic, with their loss and penalties.

    Args:
        generator: G.
        critic: D.
        loss: of both.
        penalties: of the critic.
        generator_penalties: of the generator.
        penalty_steps: whether penalties have steps of their own.
        full_precision: whether penalties are taken without autocast, on graphs of their own: under
            float16 their inner gradient has no scale to keep it from vanishing.
    """

    generator: nn.Module
    critic: nn.Module
    loss: GANLoss
    penalties: PenaltySum
    generator_penalties: PenaltySum
    penalty_steps: bool = False
    full_precision: bool = False

    def of_critic(self, micro: Micro, z: Tensor, step: int) -> Objective:
        """Return the critic's loss, and its penalties unless they have steps of their own.

        Args:
            micro: a batch.
            z: latents of the fakes, ``[B, latent_dim]``.
            step: the critic's own step.

        Returns:
            The objective.
        """
        (real, labels), fake = micro, self.fakes(micro, z)
        penalties = PenaltySum({}) if self.penalty_steps else self.penalties
        reusing = [p for p in penalties.values() if samples_reused(p) and p.acts_at(step)]
        apart = self.full_precision
        scores = scores_of(self.critic, real, fake, labels, [] if apart else reusing)
        loss = self.loss.critic(*scores.both())
        on = Scores(real, fake, labels) if apart else scores
        terms = self._act(penalties, on, step)
        total = penalties.total(loss, terms, self.critic.parameters)
        return Objective(total, terms, loss, scores)

    def penalties_of_critic(self, micro: Micro, z: Callable[[], Tensor], step: int) -> Objective:
        """Return the critic's penalties alone.

        Args:
            micro: a batch.
            z: gives latents of the fakes, if a penalty acts.
            step: the critic's own step.

        Returns:
            The objective.
        """
        real, labels = micro
        acting = any(p.acts_at(step) for p in self.penalties.values())
        fake = self.fakes(micro, z()) if acting else real  # which nobody looks at
        terms = self._act(self.penalties, Scores(real, fake, labels), step)
        return Objective(self.penalties.total(None, terms, self.critic.parameters), terms)

    def of_generator(self, micro: Micro, z: Tensor, step: int) -> Objective:
        """Return the generator's loss, and its penalties unless they have steps of their own.

        Args:
            micro: a batch, which some losses compare with.
            z: latents, ``[B, latent_dim]``.
            step: the generator's own step.

        Returns:
            The objective.
        """
        loss = self.generator_loss(micro, z)
        penalties = PenaltySum({}) if self.penalty_steps else self.generator_penalties
        terms = self._act_on_generator(penalties, micro, z, step)
        return Objective(penalties.total(loss, terms, self.generator.parameters), terms, loss)

    def penalties_of_generator(self, micro: Micro, z: Tensor, step: int) -> Objective:
        """Return the generator's penalties alone; the arguments are those of `of_generator`."""
        terms = self._act_on_generator(self.generator_penalties, micro, z, step)
        total = self.generator_penalties.total(None, terms, self.generator.parameters)
        return Objective(total, terms)

    def generator_loss(self, micro: Micro, z: Tensor) -> Tensor:
        """Return the generator's loss, which trains the generator alone: one number."""
        real, labels = micro
        with frozen(self.critic):
            fake = generated(self.generator, z, real, labels)
            of_real = score(self.critic, real, labels) if self.loss.paired else None
            return self.loss.generator(of_real, score(self.critic, fake, labels))

    def fakes(self, micro: Micro, z: Tensor) -> Tensor:
        """Return fakes for the samples of a batch, without a graph: ``[B, *S]``."""
        real, labels = micro
        with torch.no_grad():
            return generated(self.generator, z, real, labels)

    def _act(self, penalties: PenaltySum, scores: Scores, step: int) -> AllTerms:
        with self._precision(scores.real.device):
            return {name: self._act_on(p, scores, step) for name, p in penalties.items()}

    def _act_on(self, penalty: Penalty, scores: Scores, step: int) -> Terms | None:
        """Return the terms of one penalty of the critic."""
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
        self, penalties: PenaltySum, micro: Micro, z: Tensor, step: int
    ) -> AllTerms:
        with self._precision(z.device):
            return {name: self._act_on_latents(p, micro, z, step) for name, p in penalties.items()}

    def _act_on_latents(self, penalty: Penalty, micro: Micro, z: Tensor, step: int) -> Terms | None:
        """Return the terms of one penalty of the generator."""
        needs = needs_of(penalty)
        if needs.in_weights:
            return penalty.act(lambda: self.generator_loss(micro, z), self.generator, step=step)
        net = [self.generator] if needs.activations else []
        return penalty.act(conditioned(self.generator, micro[1]), z, *net, step=step)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, enabled=False) if self.full_precision else nullcontext()


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
