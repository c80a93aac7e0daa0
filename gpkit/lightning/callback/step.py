"""A wrapper of ``training_step`` that adds penalties to its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from gpkit.autodiff.sharding.gathering import is_sharded
from gpkit.autodiff.state import Start, start_of
from gpkit.finding import Finding
from gpkit.findings.located import first_watch
from gpkit.findings.trainer import findings_of_loss
from gpkit.formula import Terms
from gpkit.lightning.callback.compiled import CompiledStep, compiled_step
from gpkit.lightning.callback.differences import Differences
from gpkit.lightning.callback.evaluation import Evaluator, given_by
from gpkit.lightning.callback.plan import (
    Losses,
    PenalizedNet,
    Plan,
    losses_of,
    probe_spec,
    warn_of_rows,
)
from gpkit.lightning.compat import last_of_step, logs_now, scale_of, scaler_of
from gpkit.lightning.recording import penalty_scalars
from gpkit.lightning.refusals import CALLBACK_REFUSAL, RefusalError, refuse
from gpkit.lightning.watch.calls import SeenCalls, findings_of_calls
from gpkit.lightning.watch.capture import Capture
from gpkit.lightning.watch.entries import finding_of_entry
from gpkit.lightning.watch.probe import runs_compiled
from gpkit.lightning.watch.replay import Silencer, StepCall, TrainingStep, loss_of, replace_loss
from gpkit.needs import needs_of
from gpkit.sums import PenaltySum

BATCH_WRITTEN_IN_PLACE = (
    "the training step writes to its batch in place, and a penalty reruns it on that batch: "
    "write to a copy, or use scope='batch' with estimator='exact'"
)


class PenalizedStep:
    """Wraps ``training_step``: runs it, and adds the penalties to the loss that it returns.

    Args:
        trainer: the trainer of the fit.
        module: the LightningModule.
        penalties: by name.
        submodule: name of the submodule whose weights, inputs or activations the penalties are
            about; None is the module itself.
        findings: what was found against the penalties before the first step. It is raised at the
            first step, together with what that step shows.
        call: which call of the submodule is meant in a step that calls it several times, from 0.
        losses: where the step shows the loss of each sample, see `PenalizedNet`.
        doctor: whether an error of a penalty at its first step names modules.
        compile: whether to compile the training step with the penalties, after their first step.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        penalties: PenaltySum,
        submodule: str | None,
        findings: list[Finding],
        call: int | None = None,
        losses: Losses | None = None,
        *,
        doctor: bool = True,
        compile: bool = False,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.penalties = penalties
        needs = {name: needs_of(penalty) for name, penalty in penalties.items()}
        given = losses is not None
        self.needs = {n: own.with_losses() if given else own for n, own in needs.items()}
        net = dict(module.named_modules()).get(submodule or "", module)
        itself = f"the {type(module).__name__} itself"
        title = f"the submodule {submodule!r}" if submodule else itself
        self.findings = findings
        compiled = runs_compiled(module)
        if compiled and probe_spec(self.needs.values()).eager:
            rank_zero_warn(
                "the penalties run the compiled module uncompiled, because torch.compile has no "
                "double backward and no hooks; estimator='finite_difference' in the weights runs "
                "it compiled"
            )
        # After the warning, which may be an error: the silencer wraps methods of the module.
        options: Any = {"losses": losses, "own_batch": not submodule}
        self.watched = PenalizedNet(net, title, compiled, Silencer(module), call, **options)
        self.evaluator = Evaluator(trainer, module, self.watched, penalties, self.needs)
        self._automatic = module.automatic_optimization
        self._optimizer_step: int | None = 0
        self._not_acted_yet = set(penalties)
        self._seen: SeenCalls | None = None  # in the first step of a penalty
        self.doctor = doctor
        self._draws_before: tuple[int, list[int]] = (-1, [])  # a batch index, and penalty.draws
        self._plans: dict[tuple[str, ...], Plan] = {}  # by the names of the penalties that act
        self._compiled = self._made() if compile else None
        self._differences: Differences | None = None  # those of this step
        self._manual: tuple[StepCall, Capture, Plan] | None = None
        self._backward_calls = 0

    def __call__(self, training_step: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and return its output with the penalties added to the loss."""
        compiled = self._compiled
        if compiled is not None and not (self.findings or self._not_acted_yet) and compiled.runs:
            compiled.training_step = training_step
            return self._run_compiled(compiled, args, kwargs)
        acting, call = self._acting(), StepCall(training_step, args, kwargs)
        try:
            plan = self._plan(acting)
            if plan.draws:
                self._repeat_draws(plan.needs)
            versions = []
            if plan.runs_again:
                call.start = self._begun(plan) or start_of(self.module, self.module.device)
                versions = call.tensor_versions()
            with self._noting_calls(plan), plan.probe as capture:
                if plan.probe.spec.entries:
                    entered = self.watched.entered(call, capture, plan.probe.spec.entries)
                    args, kwargs = entered.args, entered.kwargs
                output = training_step(*args, **kwargs)
            capture.losses = self._losses(plan, output, capture, call)
        except RefusalError as error:  # from the wrapper of another callback, inside this one
            net = self._findings_of_net(capture, plan, call)
            refuse(CALLBACK_REFUSAL, [*self.findings, *net, *error.findings, *error.found], error)
        except Exception as error:
            refuse(CALLBACK_REFUSAL, self.findings, error)  # they may be the cause of the error
            raise
        if versions and versions != call.tensor_versions():
            capture.problems["batch"] = BATCH_WRITTEN_IN_PLACE
        loss = loss_of(output)
        if loss is None:  # Lightning skips the micro-batch
            if last_of_step(self.trainer):
                self.evaluator.windows.clear()
            return output
        return replace_loss(output, self._add_penalties(call, capture, plan, loss))

    def _begun(self, plan: Plan) -> Start | None:
        """Return what the step starts from, if it may repeat an earlier one; else None."""
        self._differences = self.evaluator.differences(plan)
        if self._differences is None or not self._not_acted_yet.isdisjoint(plan.needs):
            return None
        return self._differences.begin(self._optimizer_step)

    def _run_compiled(
        self, step: CompiledStep, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a training step and its penalties as one graph, and return what `__call__` does."""
        self._repeat_draws(self.penalties)
        batch = StepCall(step.training_step, args, kwargs).batch
        given = {n: given_by(own, batch) for n, own in self.needs.items() if own.given}
        scale = scale_of(scaler_of(self.trainer), self.module.device)
        output, terms = step(args, kwargs, given, scale, self.trainer.global_step)
        loss = loss_of(output)
        if loss is None:
            return output
        total = step.total(loss, terms, self.module.parameters)
        self._log(total, terms)
        return replace_loss(output, total)

    def _made(self) -> CompiledStep | None:
        options = {"automatic": self._automatic, "sharded": is_sharded(self.module)}
        return compiled_step(self.watched, self.penalties, self.needs, **options)

    def manual_training_step(self, training_step: TrainingStep, *args: Any, **kwargs: Any) -> Any:
        """Run a training step with manual optimisation, and capture what the penalties need."""
        self._backward_calls = 0
        plan = self._plan(self.penalties)
        with self._noting_calls(plan), plan.probe as capture:
            call = StepCall(training_step, args, kwargs)
            self._manual = call, capture, plan
            if plan.probe.spec.entries:
                entered = self.watched.entered(call, capture, plan.probe.spec.entries)
                args, kwargs = entered.args, entered.kwargs
            try:
                return training_step(*args, **kwargs)
            finally:
                self._manual = None  # it holds graphs

    def manual_backward(
        self, which: int, backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Call ``manual_backward``, with the penalties added to the loss of the chosen call.

        Args:
            which: the index of that call in the training step, from 0.
            backward: the module's own ``manual_backward``.
            loss: its first argument, a scalar.
            *args: its other positional arguments.
            **kwargs: its keyword arguments.
        """
        if self._backward_calls == which and self._manual is not None:
            call, capture, plan = self._manual
            acting = set(self._acting())
            needs = {name: own for name, own in plan.needs.items() if name in acting}
            capture.losses = self._losses(plan, None, capture, call)
            loss = self._add_penalties(call, capture, Plan(needs, plan.probe), loss)
        self._backward_calls += 1
        backward(loss, *args, **kwargs)
        if self._manual is not None:
            self._manual[1].end_backward()

    def remove(self) -> None:
        """Remove the hooks, and unwrap the log methods of the module."""
        self.watched.silencer.remove()
        for plan in self._plans.values():
            plan.probe.remove()

    # What a step shows.

    @contextmanager
    def _noting_calls(self, plan: Plan) -> Iterator[None]:
        """Note the submodules that a step calls, for messages, if a penalty is new in it."""
        new = not self._not_acted_yet.isdisjoint(plan.needs)
        self._seen = SeenCalls(self.module) if new and plan.probe.spec.names else None
        watches = new and self.doctor and not self.watched.compiled
        watch = first_watch(self.module) if watches else nullcontext()
        with self._seen or nullcontext(), watch as self.evaluator.watch:
            yield

    def _findings_of_net(self, capture: Capture, plan: Plan, call: StepCall) -> list[str]:
        """Return what the training step has shown of the net, one line for each finding."""
        watched, parts, spec = self.watched, self.module.named_modules(), plan.probe.spec
        names = [(n, f"activation({n!r})" if n else watched.title) for n in capture.names(spec)]
        inside = next((n for n, part in parts if part is watched.net), "")
        calls = findings_of_calls(
            capture, names, watched.call, self._seen, step="the training step", inside=inside
        )
        missing = [n for n in spec.entries if n not in (*capture.entries, *capture.problems)]
        arguments = capture.arguments[:2]
        named = [finding_of_entry(n, watched.title, arguments, call.batch) for n in missing]
        return [*capture.problems.values(), *calls, *named]

    def _losses(self, plan: Plan, output: Any, capture: Capture, call: StepCall) -> Tensor | None:
        """Return the loss of each sample, if a penalty needs it and the step shows it."""
        if self.watched.losses is None or not any(n.sample_losses for n in plan.needs.values()):
            return None
        if not capture.is_clear(plan.probe.spec, self.watched.call):
            return None  # the findings say why
        return losses_of(self.watched.losses, output, capture, call.batch)

    # Which penalties act.

    def _acting(self) -> list[str]:
        """Return the names of the penalties that act on this step; count the step for the others.

        Under manual optimisation a training step may call several optimisers, or none, so the
        penalties count the training steps and not ``trainer.global_step``.
        """
        self._optimizer_step = now = self.trainer.global_step if self._automatic else None
        acting = [name for name, penalty in self.penalties.items() if penalty.acts_at(now)]
        if len(acting) < len(self.penalties):
            for name in self.penalties.keys() - acting:
                self.penalties[name].skip(now)
        return acting

    def _plan(self, acting: Iterable[str]) -> Plan:
        """Return the plan for the penalties that act. Plans are kept, since few sets occur."""
        names = tuple(acting)
        if names not in self._plans:
            needs = {name: self.needs[name] for name in names}
            probe = self.watched.probe(needs.values())
            # Hooks that stay would make torch.compile compile the net again.
            self._plans[names] = Plan(
                needs, probe if self.watched.compiled else probe.register_hooks()
            )
        return self._plans[names]

    def _repeat_draws(self, acting: Iterable[str]) -> None:
        """Draw the same numbers again if a closure is called again on a batch, as LBFGS does."""
        batch = self.trainer.fit_loop.total_batch_idx
        penalties = [self.penalties[name] for name in acting]
        if self._draws_before[0] == batch:
            for penalty, draws in zip(penalties, self._draws_before[1], strict=True):
                penalty.draws = draws
        else:
            self._draws_before = batch, [penalty.draws for penalty in penalties]

    # The loss with penalties.

    def _add_penalties(self, call: StepCall, capture: Capture, plan: Plan, loss: Tensor) -> Tensor:
        """Return the loss with the penalties that act added, and log both."""
        first = self._not_acted_yet.intersection(plan.needs)
        spec = plan.probe.spec
        clear = not capture.problems
        if spec.names or spec.entries:
            clear = clear and capture.is_clear(spec, self.watched.call)
        if first or self.findings or not clear:
            net = self._findings_of_net(capture, plan, call)
            found: list[Finding | str] = [*self.findings, *net, *findings_of_loss(loss)]
            if found:
                refuse(CALLBACK_REFUSAL, found)
            self._not_acted_yet -= first
            if first and any(plan.needs[name].reads_input for name in first):
                warn_of_rows(self.watched, capture, call.batch)
        last, steps = last_of_step(self.trainer), self._differences
        taken = None if steps is None else steps.taken(call, loss)
        if taken is None:
            loss, terms = self.evaluator.act(
                call, capture, plan, loss, first, optimizer_step=self._optimizer_step, last=last
            )
            self.evaluator.watch = None  # it holds graphs
            summed = self.penalties.total(loss, terms, self.module.parameters)
            assert summed is not None
            total = summed
        else:
            total, terms = taken
            total = total / self.penalties.loss_scale()
            plan.probe.expect_backward()
        if last:
            self.evaluator.windows.clear()
        self._log(total, terms)
        return total

    def _log(self, total: Tensor, terms: dict[str, Terms | None]) -> None:
        if last_of_step(self.trainer) and logs_now(self.trainer):
            self.module.log("train/loss_total", total.detach())
            for name, number in penalty_scalars(self.penalties, terms).items():
                self.module.log(name, number)
