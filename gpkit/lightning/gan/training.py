"""One training step of a GAN: optimiser steps of the critic and, in turn, of the generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor

from gpkit.autodiff.random import seeded
from gpkit.findings.located import locating
from gpkit.lightning.compat import logs_now
from gpkit.lightning.gan.ema import update_average
from gpkit.lightning.gan.logging import optimality_scalars, slope_scalars
from gpkit.lightning.gan.objectives import Objective
from gpkit.lightning.gan.samples import MicroBatch
from gpkit.lightning.gan.stepping import (
    accumulate_gradients,
    clipped,
    step_optimizer,
)
from gpkit.lightning.recording import LatestStep, penalty_scalars

Evaluate = Callable[[MicroBatch], Tensor | None]  # the total of an objective, or None


@dataclass(frozen=True)
class GANStep:
    """One step of the critic, and of the generator if it is its turn.

    Args:
        module: the module that is trained. Its counts and its log are updated.
        window: the micro-batches of the step.
    """

    module: Any
    window: list[MicroBatch]

    def run(self) -> None:
        """Take the step."""
        module, counts = self.module, self.module.counts
        module.scalars.begin_step()
        counts["draws"] += 1
        due = self._due()
        with seeded(module.seed_for(counts["draws"]), module.device):
            if module.simultaneous:
                for net in [net for net, evaluate in due if self._differentiate(net, evaluate)]:
                    self._step(net)
            else:
                for net, evaluate in due:
                    if self._differentiate(net, evaluate):
                        self._step(net)
        for net in dict(due):
            counts[net] += 1
        if "generator" in dict(due) and module.ema_generator is not None:
            assert module.ema is not None
            update_average(module.ema_generator, module.generator, module.ema)

    def _due(self) -> list[tuple[str, Evaluate]]:
        """Return the nets to step, in this order, each with the objective to differentiate."""
        module = self.module
        apart, first = module.penalty_steps, module.generator_first
        critic: list[tuple[str, Evaluate]] = [("critic", self._critic_loss)]
        critic += [("critic", self._critic_penalties)] if apart else []
        turn = (module.counts["critic"] + (not first)) % module.critic_steps == 0
        if not (turn and module.trains_generator):
            return critic
        generator: list[tuple[str, Evaluate]] = [("generator", self._generator_loss)]
        generator += [("generator", self._generator_penalties)] if apart else []
        return generator + critic if first else critic + generator

    # Objectives on one micro-batch. Each keeps what is logged about it, and returns its total.

    def _critic_loss(self, micro: MicroBatch) -> Tensor | None:
        module = self.module
        found = self._located("critic", module.objectives.critic_objective, micro)
        penalties = {} if module.penalty_steps else module.penalties
        total = self._record(found, penalties, "train/critic_loss")
        self._record_critic(found)
        return total

    def _critic_penalties(self, micro: MicroBatch) -> Tensor | None:
        module = self.module
        found = self._located("critic", module.objectives.critic_penalties_alone, micro)
        return self._record(found, module.penalties)

    def _generator_loss(self, micro: MicroBatch) -> Tensor | None:
        module = self.module
        found = self._located("generator", module.objectives.generator_objective, micro)
        penalties = {} if module.penalty_steps else module.generator_penalties
        return self._record(found, penalties, "train/generator_loss")

    def _generator_penalties(self, micro: MicroBatch) -> Tensor | None:
        module = self.module
        found = self._located("generator", module.objectives.generator_penalties_alone, micro)
        return self._record(found, module.generator_penalties)

    def _located(self, net: str, objective: Callable[..., Objective], micro: MicroBatch) -> Any:
        """Return an objective. At the first step an error of a penalty names the net's modules."""
        first = self.module.doctor and self.module.counts[net] == 0
        first = first and self.module.compiled.get(net) is None  # which would trace the hooks
        with locating(getattr(self.module, net)) if first else nullcontext():
            return objective(micro, self.module.counts[net])

    def _record(self, found: Objective, penalties: Iterable[str], name: str = "") -> Tensor | None:
        """Keep what is logged about an objective, and return its total."""
        module = self.module
        if found.loss is not None:
            module.scalars.add({name: found.loss})
        scalars = penalty_scalars(penalties, found.terms)
        module.scalars.add(scalars)
        losses = {} if found.loss is None else {name: found.loss.detach()}
        module.latest_step = LatestStep({**losses, **scalars}, found.terms)
        module.histograms.collect_norms(module.trainer, found.terms)
        return found.total

    def _record_critic(self, found: Objective) -> None:
        """Keep the optimality of the critic and, on logged steps, its slopes."""
        assert found.scores is not None
        module, scores, now = self.module, found.scores, self.module.counts["critic"]
        penalties = module.penalties
        optimality = optimality_scalars(module.loss, penalties, scores, found.terms, now)
        module.scalars.add(optimality)
        if logs_now(module.trainer, ahead=module.accumulate):
            seed = module.seed_for("slopes", now)
            scalars, slopes = slope_scalars(module.critic, module.loss, penalties, scores, seed)
            module.scalars.add(scalars)
            for points, n in slopes.items():
                module.histograms.collect(module.trainer, f"slope/{points}", n)

    # Optimiser steps.

    def _differentiate(self, net: str, evaluate: Evaluate) -> bool:
        # A step on penalties alone moves every parameter, also those that they do not reach: the
        # optimisers of lazy penalties are corrected for one more step of each.
        alone = evaluate in (self._critic_penalties, self._generator_penalties)
        optimizer = self._optimizer(net)
        return accumulate_gradients(self.module, optimizer, evaluate, self.window, fill=alone)

    def _step(self, net: str) -> None:
        clip = self.module.clip if net == "critic" else None
        with clipped(self._optimizer(net), self.module.gradient_clip):
            step_optimizer(self.module, self._optimizer(net), getattr(self.module, net), clip)

    def _optimizer(self, net: str) -> LightningOptimizer:
        optimizers = self.module.optimizers()
        both = optimizers if isinstance(optimizers, list) else [optimizers]
        return both[self.module.places[net]]
