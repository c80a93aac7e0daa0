"""What the critic and the generator are trained on: a loss and penalties on one micro-batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import tree_map_only
from gpkit.compiling.entry import compiled
from gpkit.compiling.loss import CompiledLoss
from gpkit.compiling.named import begin, keeping, terms_of
from gpkit.formula import Terms
from gpkit.lightning.batches import entries, repeated
from gpkit.lightning.gan.ema import frozen
from gpkit.lightning.gan.latents import Path
from gpkit.lightning.gan.losses import GANLoss, Scored, over_scales
from gpkit.lightning.gan.samples import MicroBatch, first, generate, packed
from gpkit.lightning.gan.scores import (
    Scores,
    differentiated,
    score,
    scores_of,
    targets_on,
)
from gpkit.needs import Needs, needs_of
from gpkit.penalty import Penalty
from gpkit.sums import PenaltySum


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
        path: from latents to samples, for the generator's penalties.
        pac: samples in a pack, which the critic scores as one.
        shrink: the generator's penalties act on the first B // shrink latents of a batch.
        penalty_steps: whether penalties have steps of their own.
        full_precision: whether penalties are evaluated without autocast, in forward passes of their
            own. Under float16 their inner gradient would vanish, since no scaler scales it.
        compiled: the loss of "critic" and "generator", each with its penalties as one graph, see
            `compiled_losses`.
    """

    generator: nn.Module
    critic: nn.Module
    loss: GANLoss
    penalties: PenaltySum
    generator_penalties: PenaltySum
    latents: Callable[[int], Tensor]
    path: Path
    pac: int = 1
    shrink: int = 1
    penalty_steps: bool = False
    full_precision: bool = False
    compiled: Mapping[str, CompiledLoss | None] = field(default_factory=dict)

    def critic_objective(self, micro: MicroBatch, step: int) -> Objective:
        """Return the critic's loss, plus its penalties unless they have steps of their own.

        Args:
            micro: a micro-batch.
            step: the number of the critic's step.

        Returns:
            The objective.
        """
        samples, penalties, run = self.samples(micro), self.critic_penalties, self._run("critic")
        if run is None:
            loss, terms, scores = self.critic_terms(samples, self.reusing(step), step)
        else:
            begin(penalties, step)
            loss, reduced, of_real, of_fake = run(self, samples, self.reusing(step, graphs=True))
            scores = replace(samples, of_real=of_real, of_fake=of_fake)
            terms = terms_of(penalties, run, reduced)
        with keeping(penalties, run):
            total = penalties.total(loss, terms, self.critic.parameters)
        return Objective(total, terms, loss, scores)

    def _run(self, net: str) -> CompiledLoss | None:
        """Return the compiled loss of a net; None if it has none, or it runs as it is."""
        run = self.compiled.get(net)
        return None if run is None or run.obstacle or not torch.is_grad_enabled() else run

    @property
    def critic_penalties(self) -> PenaltySum:
        """The penalties in the step on the critic's loss."""
        return PenaltySum({}) if self.penalty_steps else self.penalties

    def reusing(self, step: int, *, graphs: bool = False) -> tuple[str, ...]:
        """Return the names of the penalties that reuse the scores of the loss.

        Args:
            step: the number of the critic's step.
            graphs: whether only those do whose whole need is the graph of the scores.
        """
        needs = {n: needs_of(p) for n, p in self.critic_penalties.items() if p.acts_at(step)}
        if self.full_precision:
            return ()
        needs = {n: own for n, own in needs.items() if not own.given}
        return tuple(n for n, own in needs.items() if own.samples and not own.continues * graphs)

    def critic_terms(
        self, samples: Scores, reusing: tuple[str, ...], step: int | None = None
    ) -> tuple[Tensor, dict[str, Terms | None], Scores]:
        """Return the critic's loss, the terms of its penalties, and the scores."""
        penalties = self.critic_penalties
        scores = scores_of(self.critic, samples, [penalties[name] for name in reusing])
        loss = over_scales(self.loss.critic, *scores.both())
        on = samples if self.full_precision else scores
        return loss, self._act(penalties, on, step, reusing), scores

    def critic_penalties_alone(self, micro: MicroBatch, step: int) -> Objective:
        """Return the critic's penalties alone; the arguments are those of `critic_objective`."""
        acting = [p for p in self.penalties.values() if p.acts_at(step)]
        samples = self.samples(micro, fakes=any("fake" in needs_of(p).reads for p in acting))
        terms = self._act(self.penalties, samples, step, ())
        return Objective(self.penalties.total(None, terms, self.critic.parameters), terms)

    def generator_objective(self, micro: MicroBatch, step: int) -> Objective:
        """Return the generator's loss, plus its penalties unless they have steps of their own.

        Args:
            micro: a micro-batch. Its real samples are used by losses in pairs only.
            step: the number of the generator's step.

        Returns:
            The objective.
        """
        z = self.latents(len(first(micro.samples)))
        penalties, run = self._penalties_of_generator, self._run("generator")
        if run is None:
            loss, terms = self.generator_terms(micro, z, step)
        else:
            begin(penalties, step)
            with frozen(self.critic):
                loss, reduced = run(self, micro, z)
            terms = terms_of(penalties, run, reduced)
        with keeping(penalties, run):
            total = penalties.total(loss, terms, self.generator.parameters)
        return Objective(total, terms, loss)

    @property
    def _penalties_of_generator(self) -> PenaltySum:
        """The penalties in the step on the generator's loss."""
        return PenaltySum({}) if self.penalty_steps else self.generator_penalties

    def generator_terms(
        self, micro: MicroBatch, z: Tensor, step: int | None = None
    ) -> tuple[Tensor, dict[str, Terms | None]]:
        """Return the generator's loss, and the terms of its penalties."""
        loss = self.generator_loss(micro, z)
        return loss, self._act_on_generator(self._penalties_of_generator, micro, z, step)

    def generator_penalties_alone(self, micro: MicroBatch, step: int) -> Objective:
        """Return the generator's penalties alone; arguments as in `generator_objective`."""
        z = self.latents(len(first(micro.samples)))
        terms = self._act_on_generator(self.generator_penalties, micro, z, step)
        total = self.generator_penalties.total(None, terms, self.generator.parameters)
        return Objective(total, terms)

    def generator_loss(self, micro: MicroBatch, z: Tensor) -> Tensor:
        """Return the generator's loss, one number. It has no gradient in the critic's weights."""
        real, labels, _ = micro
        of = packed(labels, self.pac)
        with frozen(self.critic):
            fake = packed(generate(self.generator, z, real, labels), self.pac)
            paired = self.loss.paired
            real_scores = score(self.critic, packed(real, self.pac), of) if paired else None
            return over_scales(self.loss.generator, real_scores, score(self.critic, fake, of))

    def samples(self, micro: MicroBatch, *, fakes: bool = True) -> Scores:
        """Return real samples and as many fake ones, without a graph, in packs; not yet scored.

        Args:
            micro: a micro-batch.
            fakes: whether to generate the fake samples.
        """
        real, labels, batch = micro
        fake = None
        if fakes:
            with torch.no_grad():
                fake = generate(self.generator, self.latents(len(first(real))), real, labels)
        pac = self.pac
        given = batch if any(needs_of(p).given for p in self.penalties.values()) else None
        return Scores(packed(real, pac), packed(fake, pac), packed(labels, pac), batch=given)

    def _act(
        self, penalties: PenaltySum, scores: Scores, step: int | None, reusing: tuple[str, ...]
    ) -> dict[str, Terms | None]:
        with self._precision(first(scores.real).device):
            named = penalties.items()
            return {n: self._act_on(p, scores, step, reuses=n in reusing) for n, p in named}

    def _act_on(
        self, penalty: Penalty, scores: Scores, step: int | None, *, reuses: bool
    ) -> Terms | None:
        """Evaluate one penalty of the critic, on the graph of the scores if it can reuse that."""
        real, fake, labels, critic = scores.real, scores.fake, scores.labels, self.critic
        needs, loss = needs_of(penalty), self.loss.critic
        if needs.in_weights:

            def closure() -> Tensor:
                assert fake is not None  # a penalty in the weights needs them
                of_real, of_fake = score(critic, real, labels), score(critic, fake, labels)
                return over_scales(loss, of_real, of_fake)

            given = self._given(penalty, needs, scores)
            if scores.of_real is None or not needs.reuses_graph:
                return penalty.act(closure, critic, step=step, **given)
            return penalty.act(over_scales(loss, *scores.both()), critic, step=step, **given)
        if reuses and scores.of_real is not None:
            return penalty.act(targets_on(critic, scores, penalty, needs), step=step)
        net = [critic] if needs.activations else []
        f = differentiated(critic, labels, penalty, real)
        given = self._given(penalty, needs, scores)
        return penalty.act(f, *net, real=real, fake=fake, step=step, **given)

    def _given(self, penalty: Any, needs: Needs, scores: Scores) -> dict[str, Any]:
        """Return what a penalty needs of the batch, for each of its points."""
        if not needs.given:
            return {}
        found = entries(needs.given, scores.batch)
        if needs.in_weights:
            return found
        x, y = ((first(s),) if s is not None else None for s in (scores.real, scores.fake))
        batch, points = len(first(scores.real)), sum(penalty.at.sizes(x, y))
        return {name: repeated(value, batch, points) for name, value in found.items()}

    def _act_on_generator(
        self, penalties: PenaltySum, micro: MicroBatch, z: Tensor, step: int | None
    ) -> dict[str, Terms | None]:
        with self._precision(z.device):
            return {name: self._act_on_latents(p, micro, z, step) for name, p in penalties.items()}

    def _act_on_latents(
        self, penalty: Penalty, micro: MicroBatch, z: Tensor, step: int | None
    ) -> Terms | None:
        """Evaluate one penalty of the generator."""
        if self.shrink > 1:
            some = max(1, len(z) // self.shrink)
            z, parts = z[:some], tree_map_only(Tensor, lambda t: t[:some], tuple(micro[:2]))
            micro = MicroBatch(*parts)
        if needs_of(penalty).in_weights:
            return penalty.act(lambda: self.generator_loss(micro, z), self.generator, step=step)
        return self.path.act(penalty, z, micro.labels, step)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, enabled=False) if self.full_precision else nullcontext()


def compiled_losses(module: Any) -> dict[str, CompiledLoss | None]:
    """Return the losses of a GAN's nets with their penalties, each as one graph.

    None stands for one that cannot be compiled; a warning says why.
    """
    losses = {"critic": compiled(critic_loss, module.penalties), "generator": None}
    if module.path.parts and module.generator_penalties:
        warnings.warn(
            "`compile=True` has no effect on the generator's step: its penalties are in w, and the "
            "mapping's forward pass has random numbers of its own",
            stacklevel=3,
        )
    elif module.trains_generator:
        losses["generator"] = compiled(generator_loss, module.generator_penalties)
    return losses


def generator_loss(
    of: Objectives, micro: MicroBatch, z: Tensor
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return what a graph computes of the generator's step.

    Args:
        of: the nets with their loss and penalties.
        micro: a micro-batch.
        z: latents.

    Returns:
        The loss, and the value of each penalty without its weight.
    """
    loss, terms = of.generator_terms(micro, z)
    return loss, {name: None if own is None else own.reduced for name, own in terms.items()}


def critic_loss(
    of: Objectives, samples: Scores, reusing: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor | None], Scored, Scored]:
    """Return what a graph computes of the critic's step.

    Args:
        of: the nets with their loss and penalties.
        samples: real and fake ones.
        reusing: the names of the penalties that reuse the scores of the loss.

    Returns:
        The loss, the value of each penalty without its weight, and the scores.
    """
    loss, terms, scores = of.critic_terms(samples, reusing)
    values = {name: None if own is None else own.reduced for name, own in terms.items()}
    return loss, values, *scores.both()
