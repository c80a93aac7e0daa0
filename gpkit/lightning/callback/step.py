"""A training step with penalties: it stands in for the ``training_step`` of a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.numerics import wide
from gpkit.autodiff.random import random_state
from gpkit.estimators.base import Target
from gpkit.estimators.recomputable import Recomputable
from gpkit.estimators.window import Window, summarised
from gpkit.formula import Terms
from gpkit.lightning.callback.findings import (
    BATCH_WRITTEN_IN_PLACE,
    REFUSAL_TITLE,
    findings_of_loss,
    findings_of_net,
    holds_fsdp2_shards,
)
from gpkit.lightning.callback.plan import Plan, differentiated, wanted_by
from gpkit.lightning.compat import last_of_step, logs_now, scale_of, scaler_of
from gpkit.lightning.recording import penalty_numbers
from gpkit.lightning.refusals import RefusalError, refuse
from gpkit.lightning.watch.probe import Seen, runs_compiled, watched
from gpkit.lightning.watch.replay import (
    Silencer,
    StepCall,
    TrainingStep,
    loss_of,
    per_sample_losses,
    replace_loss,
)
from gpkit.needs import Needs, needs_of
from gpkit.sums import PenaltySum


class PenalisedStep:
    """Stands in for a module's ``training_step``: what that returns, with penalties.

    Args:
        trainer: of the run.
        module: the LightningModule.
        penalties: by name.
        name: of the submodule that they are about; None is the module itself.
        problems: what was found against the penalties already; it is told at the first step, with
            what is found there.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        penalties: PenaltySum,
        name: str | None,
        problems: list[str],
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.penalties = penalties
        self.needs = {name: needs_of(penalty) for name, penalty in penalties.items()}
        self.net: nn.Module = dict(module.named_modules()).get(name or "", module)
        self.title = f"the submodule {name!r}" if name else f"the {type(module).__name__} itself"
        self.problems = problems
        self.windows: dict[str, Window] = {}
        self._drawn: tuple[int, list[int]] = (-1, [])  # a batch, and the draws before it
        self._automatic = module.automatic_optimization
        self._scaler = scaler_of(trainer)
        self._now: int | None = 0  # the optimiser step
        # A compiled net has neither hooks nor a double backward.
        self._compiled = runs_compiled(module)
        self._unseen = set(penalties)  # that have not acted yet
        if self._compiled and wanted_by(self.needs.values()).eager:
            rank_zero_warn(
                "penalties by double backprop, in inputs or in activations run a compiled module "
                "uncompiled; estimator='finite_difference' in the weights runs it compiled"
            )
        self._shards: Any = None
        if holds_fsdp2_shards(module):
            from gpkit.lightning.callback.sharded import ShardedWeights

            self._shards = ShardedWeights(module)
        self.silencer = Silencer(module)
        self._plans: dict[tuple[str, ...], Plan] = {}  # by the names of those that act together
        self._parameters: list[Tensor] = []
        self._counts: dict[int, Tensor] = {}  # of samples, as tensors
        self._manual: tuple[StepCall, Seen, Plan] | None = None
        self._calls = 0

    def __call__(self, training_step: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and return what it gives with the penalties added to the loss."""
        acting, call = self._acting(), StepCall(training_step, args, kwargs)
        try:
            plan = self._plan(acting)
            if plan.draws:
                self._repeat_draws(plan.needs)
            versions = []
            if plan.runs_again:
                call.rng_state = random_state(self.module.device)
                versions = call.tensor_versions()
            with plan.watch as seen:
                output = training_step(*args, **kwargs)
        except RefusalError as error:  # by another callback's step, within this one
            net = findings_of_net(self.module, self.title, seen, plan.watch.wanted)
            refuse(REFUSAL_TITLE, [*self.problems, *net, *error.found], error)
        except Exception as error:
            refuse(REFUSAL_TITLE, self.problems, error)  # of which the error may be a consequence
            raise
        if versions and versions != call.tensor_versions():
            seen.problems.append(BATCH_WRITTEN_IN_PLACE)
        loss = loss_of(output)
        if loss is None:  # Lightning skips the micro-batch
            if last_of_step(self.trainer):
                self.windows.clear()
            return output
        return replace_loss(output, self._penalised(call, seen, plan, loss))

    def manual(self, training_step: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        """Run a training step that optimises manually, and watch it."""
        self._calls = 0
        plan = self._plan(self.penalties)
        with plan.watch as seen:
            self._manual = StepCall(training_step, args, kwargs), seen, plan
            try:
                return training_step(*args, **kwargs)
            finally:
                self._manual = None  # with the graphs that it holds

    def backward(
        self, backward: TrainingStep, which: int, loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Make a ``manual_backward`` call, with the penalties added if it is the chosen one."""
        if self._calls == which and self._manual is not None:
            call, seen, plan = self._manual
            acting = set(self._acting())
            needs = {name: own for name, own in plan.needs.items() if name in acting}
            loss = self._penalised(call, seen, Plan(needs, plan.watch), loss)
        self._calls += 1
        backward(loss, *args, **kwargs)

    def remove(self) -> None:
        """Leave the module as it was."""
        self.silencer.remove()
        for plan in self._plans.values():
            plan.watch.remove()

    # What acts.

    def _acting(self) -> list[str]:
        """Return the names of the penalties that act on this step; the others count it."""
        # With optimisers of the module's own, penalties count the steps themselves.
        self._now = now = self.trainer.global_step if self._automatic else None
        acting = [name for name, penalty in self.penalties.items() if penalty.acts_at(now)]
        for name in self.penalties.keys() - acting:
            self.penalties[name].skip(now)
        return acting

    def _plan(self, acting: Iterable[str]) -> Plan:
        """Return what penalties need together, of which the same ones mostly act."""
        names = tuple(acting)
        if names not in self._plans:
            needs = {name: self.needs[name] for name in names}
            watch = self._watched(needs.values())
            # A compiled net would be compiled anew with the hooks.
            self._plans[names] = Plan(needs, watch if self._compiled else watch.keep())
        return self._plans[names]

    def _watched(
        self, needs: Iterable[Needs], moved: Mapping[str, Tensor] | None = None
    ) -> watched:
        """Return what watches the net, on kernels that the penalties can differentiate."""
        wanted = wanted_by(needs)
        eager = self._compiled and wanted.eager
        return watched(self.net, self.title, wanted, moved, eager=eager)

    def _repeat_draws(self, acting: Iterable[str]) -> None:
        """Draw the same numbers where a closure is called again for a batch, as LBFGS does."""
        batch = self.trainer.fit_loop.total_batch_idx
        penalties = [self.penalties[name] for name in acting]
        if self._drawn[0] == batch:
            for penalty, draws in zip(penalties, self._drawn[1], strict=True):
                penalty.draws = draws
        else:
            self._drawn = batch, [penalty.draws for penalty in penalties]

    # The loss.

    def _penalised(self, call: StepCall, seen: Seen, plan: Plan, loss: Tensor) -> Tensor:
        """Return the loss with the penalties that act."""
        first = self._unseen.intersection(plan.needs)
        if self.problems or seen.problems or first:
            net = findings_of_net(self.module, self.title, seen, plan.watch.wanted)
            refuse(REFUSAL_TITLE, [*self.problems, *net, *findings_of_loss(loss)])
            self._unseen -= first
        last = last_of_step(self.trainer)
        if self._shards is not None:
            loss, terms = self._act_sharded(call, plan, loss)
        else:
            loss, terms = self._act(call, seen, plan, loss, first, last=last)
        total = self.penalties.total(loss, terms, self.module.parameters)
        assert total is not None
        if last:
            self.windows.clear()
            if logs_now(self.trainer):
                self.module.log("train/loss_total", total.detach())
                for name, number in penalty_numbers(self.penalties, terms).items():
                    self.module.log(name, number)
        return total

    def _act(
        self, call: StepCall, seen: Seen, plan: Plan, loss: Tensor, first: set[str], *, last: bool
    ) -> tuple[Tensor, dict[str, Terms | None]]:
        """Return the loss, with its gradient known where it pays, and the terms of the penalties.

        Args:
            call: the step, to be run again.
            seen: of the net.
            plan: of the penalties that act.
            loss: of the step.
            first: the names of those that act for the first time.
            last: whether this is the last micro-batch of an optimiser step.

        Returns:
            The loss and terms by name.

        Raises:
            RuntimeError: that of a penalty which has acted before, as it is.
        """
        scale = scale_of(self._scaler, loss.device)
        waiting = () if last else plan.names(lambda n: n.pooled)
        once = plan.names(lambda n: n.loss_at_two_points)
        base = loss
        if waiting or once:
            windows = [(self._window(n), partial(self._isolated, call, n)) for n in waiting]
            retain = bool(plan.needs.keys() - {*waiting, *once})
            base = summarised(loss, scale, retain=retain, windows=windows)
        terms: dict[str, Terms | None] = {}
        found: list[str] = []
        cause = None
        for name, needs in plan.needs.items():
            penalty = self.penalties[name]
            if name in waiting:
                penalty.skip(self._now)
                continue
            value = base if name in once else differentiated(needs, seen, loss)
            f, *args = self._penalty_arguments(name, call, seen, value)
            try:
                terms[name] = penalty.act(f, *args, step=self._now, scale=scale)
                plan.watch.last = True  # what it ran again is over: next is this step's backward
            except RuntimeError as error:
                if name not in first or type(error) is not RuntimeError:  # but out of memory
                    raise
                found, cause = [*found, f"penalty {name!r}: {error}"], error
        refuse(REFUSAL_TITLE, found, cause)
        return base, terms

    def _act_sharded(
        self, call: StepCall, plan: Plan, loss: Tensor
    ) -> tuple[Tensor, dict[str, Terms | None]]:
        """Return the loss and the terms of penalties in weights that FSDP2 has sharded."""
        acting = {name: self.penalties[name] for name in plan.needs}
        if not acting:
            return loss, {}
        again = partial(self._again, self.module, call, next(iter(acting)))  # of all it is the loss
        terms: tuple[Tensor, dict[str, Terms | None]]
        terms = self._shards.terms(acting, Recomputable(loss, again, call.rng_state), self._now)
        return terms

    def _penalty_arguments(self, name: str, call: StepCall, seen: Seen, value: Any) -> list[Any]:
        """Return what a penalty is called with."""
        penalty, needs = self.penalties[name], self.needs[name]
        if needs.plain and penalty.effect_confirmed:
            return [self._target(needs, seen, value)]
        again = partial(self._again, self.module, call, name)
        if needs.each_gradient:
            return [partial(per_sample_losses, self.module, call, self.silencer), self.net]
        if needs.in_weights:
            window = self._window(name) if needs.pooled else None
            return [Recomputable(value, again, call.rng_state, window=window), self.net]
        if needs.at_data and not needs.calls_net:
            x = seen.activations[needs.in_activation] if needs.in_activation else seen.x
            return [Recomputable(value, again, call.rng_state, mean=needs.of_loss), x]
        assert seen.x is not None
        if needs.calls_net:
            return [self.net, seen.x.detach()]
        if needs.in_activation:  # L there, for each sample, has the right sum
            return [lambda z: again(z).expand(len(z)), seen.x.detach(), self.net]
        return [Recomputable(None, again, call.rng_state, mean=True), seen.x.detach()]

    def _target(self, needs: Needs, seen: Seen, loss: Tensor) -> Target:
        """Return what a plain penalty differentiates: a call would read the same out of it."""
        if needs.in_weights:
            self._parameters = self._parameters or list(self.net.parameters())
            return Target(loss, tuple(p for p in self._parameters if p.requires_grad), False)
        assert seen.x is not None
        batch = seen.x.shape[0]
        if batch not in self._counts:
            self._counts[batch] = torch.full_like(loss.detach(), batch, dtype=wide(loss))
        return Target(loss, (seen.x,), True, times=self._counts[batch])

    # Reruns of the training step.

    def _again(self, module: nn.Module, call: StepCall, name: str, *xs: Tensor) -> Any:
        """Return what a penalty differentiates, of a step run again, at other inputs if given.

        Args:
            module: the LightningModule, named for the isolation of what is called.
            call: the step.
            name: of the penalty.
            *xs: the input, or the activation, to compute with.

        Returns:
            The loss, or what the net gives.
        """
        needs = self.needs[name]
        moved = {"" if needs.moves else needs.in_activation: xs[0]} if xs else None
        with self.silencer.silenced(), self._watched([needs], moved) as seen:
            output = call.training_step(*call.args, **call.kwargs)
        return differentiated(needs, seen, loss_of(output))

    def _isolated(self, call: StepCall, name: str) -> Tensor:
        """Return the loss of a step run again, for a window."""
        order = self.needs[name].order
        device = self.module.device
        with isolated(self.module, call.rng_state, device, max(order, 1), twice=order > 0):
            return self._again(self.module, call, name)

    def _window(self, name: str) -> Window:
        size = self.trainer.accumulate_grad_batches
        ranks = self.penalties[name].axes()["scope"] == "global"
        return self.windows.setdefault(name, Window(size, ranks=ranks))
