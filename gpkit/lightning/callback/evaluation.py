"""Evaluate penalties on a training step, and rerun the step for those that need it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.numerics import wide
from gpkit.autodiff.random import RandomState, has_ranks
from gpkit.autodiff.sharding.gathering import is_sharded
from gpkit.autodiff.state import Start
from gpkit.axes.given.given import Given
from gpkit.axes.given.sample_weight import has_steps, kept
from gpkit.estimators.base import Recomputable, Target
from gpkit.estimators.window import Window, summarised
from gpkit.finding import FoundError
from gpkit.findings.located import located
from gpkit.findings.watch import Watch
from gpkit.formula import Terms
from gpkit.lightning.batches import entries
from gpkit.lightning.callback.again import Again
from gpkit.lightning.callback.differences import Differences, alone
from gpkit.lightning.callback.plan import PenalizedNet, Plan, differentiated
from gpkit.lightning.compat import scale_of, scaler_of
from gpkit.lightning.refusals import CALLBACK_REFUSAL, refuse
from gpkit.lightning.watch.capture import Capture
from gpkit.lightning.watch.entries import net_of_entries
from gpkit.lightning.watch.replay import StepCall, per_sample_losses
from gpkit.needs import Needs
from gpkit.sums import PenaltySum


def given_by(needs: Needs, batch: Any) -> dict[str, Any]:
    """Return what a penalty needs of a batch. Of weights of steps, which samples have a step.

    Raises:
        ValueError: if steps weigh differently, and the step shows one number, the mean loss.
    """
    given = entries(needs.given, batch)
    weights: Any = given.get("sample_weight")
    if needs.weighs_steps and has_steps(weights):
        if not (needs.given_losses or bool(((weights == 0) | (weights == 1)).all())):
            raise ValueError(
                "sample_weight= of steps that is no mask of zeros and ones needs the loss of each "
                "step, and a training step shows their mean: say where they are, "
                "GradientPenaltyCallback(..., losses=lambda output, batch: losses), or give "
                "weights [B]"
            )
        given["sample_weight"] = kept(weights)
    return given


class Evaluator:
    """Evaluates penalties on the micro-batches of a module.

    Args:
        trainer: the trainer of the fit.
        module: the LightningModule.
        watched: the module or submodule that the penalties are about.
        penalties: by name.
        needs: of each penalty, by name.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        watched: PenalizedNet,
        penalties: PenaltySum,
        needs: dict[str, Needs],
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.watched = watched
        self.penalties = penalties
        self.needs = needs
        self.watch: Watch | None = None  # of the first step of a penalty
        self.windows: dict[str, Window] = {}  # by penalty, of this optimiser step
        self._scaler = scaler_of(trainer)
        self._sharded_weights: Any = None
        if is_sharded(module):
            from gpkit.lightning.callback.sharded import ShardedWeights

            self._sharded_weights = ShardedWeights(module)
        self._parameters: list[Tensor] = []  # of the net; listing them takes time at every step
        self._batch_sizes: dict[int, Tensor] = {}  # as tensors, for the same reason
        self._differences: dict[str, Differences] = {}  # by penalty

    def differences(self, plan: Plan) -> Differences | None:
        """Return the steps by differences that a plan's penalty takes, where it acts alone."""
        name = None if self.watched.compiled or self._sharded_weights else alone(plan)
        if name is None or scale_of(self._scaler, self.module.device) is not None:
            return None
        if name not in self._differences:
            again = Again(self.module, self.watched, self.needs[name])
            self._differences[name] = Differences(name, self.penalties[name], again)
        return self._differences[name]

    def act(
        self,
        call: StepCall,
        capture: Capture,
        plan: Plan,
        loss: Tensor,
        first: set[str],
        *,
        optimizer_step: int | None,
        last: bool,
    ) -> tuple[Tensor, dict[str, Terms | None]]:
        """Evaluate the penalties on one micro-batch.

        Args:
            call: the training step, for penalties that rerun it.
            capture: what the hooks captured in it.
            plan: the penalties that act.
            loss: the loss of the step, one number.
            first: names of the penalties that act for the first time.
            optimizer_step: for the schedules; None if the penalties count the steps.
            last: whether this is the last micro-batch of an optimiser step.

        Returns:
            The loss, and the terms of the penalties by name. If a penalty pools the gradients of
            micro-batches, or takes first gradients at two points, the gradient of the loss has been
            computed: the returned loss has it in place of a graph.

        Raises:
            RuntimeError: from a penalty that has acted before. From one that acts for the first
                time it becomes part of the refusal, with all others.
        """
        sharded: dict[str, Terms | None] = {}
        total = loss
        if self._sharded_weights is not None:
            in_weights = {n: own for n, own in plan.needs.items() if own.in_weights}
            others = {n: own for n, own in plan.needs.items() if not own.in_weights}
            total, sharded = self._act_sharded(
                call, in_weights, loss, optimizer_step, retain=bool(others)
            )
            plan = Plan(others, plan.probe)
        scale = scale_of(self._scaler, loss.device)
        waiting = () if last else plan.pooled
        two_points = plan.two_points
        base = loss
        if waiting or two_points:
            rerun = partial(self.watched.rerun_isolated, self.module, call)
            windows = [(self._window(n), partial(rerun, self.needs[n])) for n in waiting]
            retain = bool(plan.needs.keys() - {*waiting, *two_points})
            base = summarised(loss, scale, retain=retain, windows=windows)
        terms: dict[str, Terms | None] = {}
        found: list[str] = []
        cause = None
        for name, needs in plan.needs.items():
            penalty = self.penalties[name]
            if name in waiting:  # it acts on the last micro-batch
                penalty.skip(optimizer_step)
                continue
            value = base if name in two_points else differentiated(needs, capture, loss, call.batch)
            value = None if needs.own_forward else value
            differences = self.differences(plan)
            f, *args = (
                self._penalty_arguments(name, call, capture, value)
                if differences is None
                else [differences.recomputable(value, call), self.watched.net]
            )
            given = given_by(needs, call.batch) if needs.given else {}
            try:
                terms[name] = penalty.act(f, *args, step=optimizer_step, scale=scale, **given)
                if differences is not None:
                    differences.note(f, loss)
                plan.probe.expect_backward()  # its reruns are over: the step's own backward is next
            except RuntimeError as error:
                # torch.OutOfMemoryError is a RuntimeError too, and no finding.
                if name not in first or not (
                    type(error) is RuntimeError or isinstance(error, FoundError)
                ):
                    raise
                told: Exception = error
                if isinstance(error, FoundError) and self.watch is not None:
                    told = located(error, self.watch)
                found, cause = [*found, f"penalty {name!r}: {told}"], error
        if found:
            refuse(CALLBACK_REFUSAL, found, cause)
        return (base if total is loss else total), sharded | terms

    def _act_sharded(
        self,
        call: StepCall,
        needs: dict[str, Needs],
        loss: Tensor,
        optimizer_step: int | None,
        *,
        retain: bool,
    ) -> tuple[Tensor, dict[str, Terms | None]]:
        """Evaluate penalties in weights that FSDP2 has sharded; see `act`."""
        acting = {name: self.penalties[name] for name in needs}
        if not acting:
            return loss, {}
        # Any name will do: all these penalties differentiate the loss.
        rerun = partial(self.watched.rerun, self.module, call, next(iter(needs.values())))
        given = Recomputable(loss, rerun, call.start or ())
        terms: tuple[Tensor, dict[str, Terms | None]]
        compared = {
            name: Given(**given_by(own, call.batch)) for name, own in needs.items() if own.given
        }
        options = {"retain": retain, "compared": compared}
        terms = self._sharded_weights.terms(acting, given, optimizer_step, **options)
        return terms

    def _penalty_arguments(
        self, name: str, call: StepCall, capture: Capture, value: Any
    ) -> list[Any]:
        """Return the positional arguments for ``penalty.act``; ``value`` is differentiated."""
        penalty, needs = self.penalties[name], self.needs[name]
        if needs.plain and penalty.effect_confirmed:
            repeats = needs.in_weights and not has_ranks()
            repeats = repeats and not torch.is_autocast_enabled(value.device.type)
            return [value, self.watched.net] if repeats else [self._target(needs, capture, value)]
        rerun = partial(self.watched.rerun, self.module, call, needs)
        state: RandomState | Start = call.start or ()
        if needs.own_forward:  # after the training forward pass: of its start, the draws alone
            state = call.start.torch if call.start else ()
        if needs.splits_batch:
            losses = partial(per_sample_losses, self.module, call, self.watched.silencer)
            return [Recomputable(None, losses, state), self.watched.net]
        if needs.in_weights:
            window = self._window(name) if needs.pooled else None
            return [Recomputable(value, rerun, state, window=window), self.watched.net]
        rerun = partial(rerun, indices=self.watched.indices(needs, capture))
        mean = needs.of_loss and not needs.given_losses
        if needs.names:
            return self._named_arguments(needs, capture, value, rerun, state)
        if needs.at_data and not needs.calls_net:
            x: Any = tuple(capture.activations[name] for name in needs.in_activation) or capture.x
            rerun = partial(rerun, before=x) if needs.in_activation else rerun
            return [Recomputable(value, rerun, state, mean=mean), x]
        assert capture.x is not None
        module = [self.watched.net] if needs.activations else []
        if needs.calls_net:
            return [capture.net_at(self.watched.net), capture.x.detach(), *module]
        if needs.in_activation:  # the mean loss for every sample: their sum is right
            return [lambda z: rerun(z).expand(len(z)), capture.x.detach(), *module]
        return [Recomputable(None, rerun, call.start or (), mean=mean), capture.x.detach()]

    def _named_arguments(
        self, needs: Needs, capture: Capture, value: Any, rerun: Any, state: Any
    ) -> list[Any]:
        """Return the positional arguments of a penalty in inputs by name."""
        x = {name: capture.entries[name] for name in needs.names}
        paths = [None if n in capture.of_call else capture.batch_paths[n] for n in needs.names]
        rerun = partial(rerun, paths=paths)
        if needs.at_data and not needs.calls_net:
            mean = needs.of_loss and not needs.given_losses
            return [Recomputable(value, rerun, state, mean=mean), x]
        x = {name: entry.detach() for name, entry in x.items()}
        if needs.calls_net and set(needs.names) <= capture.paths.keys():
            places = [capture.paths[name] for name in needs.names]
            return [net_of_entries(self.watched.net, capture.arguments[:2], places), x]
        mean = needs.of_loss and not needs.given_losses
        return [Recomputable(None, rerun, state, mean=mean), x]

    def _target(self, needs: Needs, capture: Capture, loss: Tensor) -> Target:
        """Return the target of a plain penalty: a shortcut, equal to what a call would build."""
        if needs.in_weights:
            self._parameters = self._parameters or list(self.watched.net.parameters())
            return Target(loss, tuple(p for p in self._parameters if p.requires_grad), False)
        assert capture.x is not None
        batch = capture.x.shape[0]
        if batch not in self._batch_sizes:
            self._batch_sizes[batch] = torch.full_like(loss.detach(), batch, dtype=wide(loss))
        return Target(loss, (capture.x,), True, times=self._batch_sizes[batch])

    def _window(self, name: str) -> Window:
        size = self.trainer.accumulate_grad_batches
        ranks = self.penalties[name].axes()["scope"] == "global"
        return self.windows.setdefault(name, Window(size, ranks=ranks))
