"""A training step with penalties."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from gpkit.calls import Computed
from gpkit.captures import Named
from gpkit.isolation import isolated, random_state
from gpkit.lightning import asked
from gpkit.lightning.findings import IN_PLACE, RefusalError, of_loss, of_net, refuse, sharded
from gpkit.lightning.probe import Needs, Seen, runs_compiled, watched
from gpkit.lightning.replay import Made, Step, Traces, loss_of, losses_of, with_loss_of
from gpkit.lightning.scaling import scale_of, scaler_of
from gpkit.penalty import GradientPenalty, Terms
from gpkit.targets import Target, wide
from gpkit.together import summarised
from gpkit.window import POOLED, Window

Acting = Mapping[str, GradientPenalty]


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
        self, trainer: Any, module: Any, penalties: Acting, name: str | None, problems: list[str]
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.penalties = penalties
        self.net: nn.Module = dict(module.named_modules()).get(name or "", module)
        self.title = f"the submodule {name!r}" if name else f"the {type(module).__name__} itself"
        self.problems = problems
        self.windows: dict[str, Window] = {}
        self._drawn: tuple[int, list[int]] = (-1, [])  # a batch, and the draws before it
        self._automatic = module.automatic_optimization
        self._scaler = scaler_of(trainer)
        self._at: int | None = 0  # the optimiser step
        self._divides = any(hasattr(p.weight, "loss_scale") for p in penalties.values())
        # A compiled net has neither hooks nor a double backward.
        self._compiled = runs_compiled(module)
        self._unseen = set(penalties)  # that have not acted yet
        if self._compiled and asked.needs(penalties).eager:
            rank_zero_warn(
                "penalties by double backprop, in inputs or in activations run a compiled module "
                "uncompiled; estimator='finite_difference' in the weights runs it compiled"
            )
        self._shards: Any = None
        if sharded(module):
            from gpkit.lightning.sharded import ShardedWeights

            self._shards = ShardedWeights(module)
        self.traces = Traces(module)
        self._plain = {name for name, penalty in penalties.items() if asked.plain(penalty)}
        self._plans: dict[tuple[str, ...], watched] = {}  # by the names of those that act together
        self._parameters: list[Tensor] = []
        self._counts: dict[int, Tensor] = {}  # of samples, as tensors
        self._manual: tuple[Made, Seen, watched] | None = None
        self._calls = 0

    def __call__(self, step: Step, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and return what it gives with the penalties added to the loss."""
        acting = self._acting()
        made = Made(step, args, kwargs)
        try:
            watch = self._plan(acting)
            needs = watch.needs
            if needs.draws:
                self._repeat_draws(acting)
            versions = []
            if needs.state:
                made.state = random_state(self.module.device)
                versions = made.versions()
            with watch as seen:
                output = step(*args, **kwargs)
        except RefusalError as error:  # by another callback's step, within this one
            net = of_net(self.module, self.title, seen, needs)
            refuse([*self.problems, *net, *error.found], error)
        except Exception as error:
            refuse(self.problems, error)  # of which the error may be a consequence
            raise
        if versions and versions != made.versions():
            seen.problems.append(IN_PLACE)
        loss = loss_of(output)
        if loss is None:  # Lightning skips the micro-batch
            if self._last():
                self.windows.clear()
            return output
        return with_loss_of(output, self._penalised(made, seen, watch, loss, acting))

    def manual(self, step: Step, *args: Any, **kwargs: Any) -> Any:
        """Run a training step that optimises manually, and watch it."""
        self._calls = 0
        watch = self._plan(self.penalties)
        with watch as seen:
            self._manual = Made(step, args, kwargs), seen, watch
            try:
                return step(*args, **kwargs)
            finally:
                self._manual = None  # with the graphs that it holds

    def backward(self, backward: Step, which: int, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Make a ``manual_backward`` call, with the penalties added if it is the chosen one."""
        if self._calls == which and self._manual is not None:
            loss = self._penalised(*self._manual, loss, self._acting())
        self._calls += 1
        backward(loss, *args, **kwargs)

    def _step(self) -> int | None:
        """Return the optimiser step. With optimisers of the module's own, penalties count."""
        return self.trainer.global_step if self._automatic else None

    def _last(self) -> bool:
        """Return whether this is the last micro-batch of an optimiser step."""
        trainer = self.trainer
        return trainer.accumulate_grad_batches == 1 or not trainer.fit_loop._should_accumulate()

    def _acting(self) -> Acting:
        """Return the penalties that act on this step; the others count it."""
        self._at = step = self._step()
        acting = {}
        for name, penalty in self.penalties.items():
            if penalty.weight_at(penalty.step if step is None else step):
                acting[name] = penalty
            else:
                penalty.count_step(step)
        return acting

    def _repeat_draws(self, acting: Acting) -> None:
        """Draw the same numbers where a closure is called again for a batch, as LBFGS does."""
        now = self.trainer.fit_loop.total_batch_idx
        if self._drawn[0] == now:
            for penalty, draws in zip(acting.values(), self._drawn[1], strict=True):
                penalty.draws = draws
        else:
            self._drawn = now, [penalty.draws for penalty in acting.values()]

    def _plan(self, acting: Acting) -> watched:
        """Return what watches the net for penalties, of which the same ones mostly act."""
        names = tuple(acting)
        if names not in self._plans:
            watch = self._watched(asked.needs(acting))
            # A compiled net would be compiled anew with the hooks.
            self._plans[names] = watch if self._compiled else watch.keep()
        return self._plans[names]

    def _watched(self, needs: Needs, moved: Mapping[str, Tensor] | None = None) -> watched:
        """Return what watches the net, on kernels that the penalties can differentiate."""
        eager = self._compiled and needs.eager
        return watched(self.net, self.title, needs, moved, eager=eager)

    def remove(self) -> None:
        """Leave the module as it was."""
        self.traces.remove()
        for watch in self._plans.values():
            watch.remove()

    def _penalised(
        self, made: Made, seen: Seen, watch: watched, loss: Tensor, acting: Acting
    ) -> Tensor:
        """Return the loss with the penalties that act."""
        needs = watch.needs
        first = self._unseen.intersection(acting)
        if self.problems or seen.problems or first:
            net = of_net(self.module, self.title, seen, needs)
            refuse([*self.problems, *net, *of_loss(loss)])
            self._unseen -= first
        if self._shards is not None:
            return self._sharded(made, loss, acting)
        step = self._at
        scale = scale_of(self._scaler, loss.device)
        last = self._last()
        base, waiting = loss, () if last else needs.pooled
        if waiting or needs.differing:
            windows = [
                (self._window(n, acting[n]), partial(self._isolated, made, acting[n]))
                for n in waiting
            ]
            retain = bool(acting.keys() - {*waiting, *needs.differing})
            base = summarised(loss, scale, retain=retain, windows=windows)
        terms: dict[str, Terms] = {}
        found: list[str] = []
        cause, total = None, base
        for name, penalty in acting.items():
            if name in self._plain and penalty.seen_to_act:
                term = penalty.act_on(self._target(penalty, seen, loss), step, scale)
            elif name in waiting:
                penalty.count_step(step)
                continue
            else:
                value = base if name in needs.differing else asked.value(penalty, seen, loss)
                f, *args = self._call(name, penalty, made, seen, value)
                try:
                    acted = penalty.act(f, *args, step=step, scale=scale)
                    watch.last = True  # whatever it ran again: next is a backward of this step
                except RuntimeError as error:
                    if name not in first or type(error) is not RuntimeError:  # but out of memory
                        raise
                    found, cause = [*found, f"penalty {name!r}: {error}"], error
                    continue
                assert acted is not None, "its weight is not zero"
                term = acted
            terms[name], total = term, term.added_to(total)
            measure = getattr(penalty.weight, "measure", None)
            if measure is not None:
                measure(base, term.penalty, self.module.parameters(), penalty.step - 1)
        refuse(found, cause)
        if self._divides:
            total = total / max(p.loss_scale() for p in self.penalties.values())
        if last:
            self.windows.clear()
            self._log(total, terms)
        return total

    def _target(self, penalty: GradientPenalty, seen: Seen, loss: Tensor) -> Target:
        """Return what a plain penalty differentiates."""
        if asked.in_weights(penalty):
            trained = tuple(p for p in self._all() if p.requires_grad)
            return Target(loss, trained, False)
        assert seen.x is not None
        batch = seen.x.shape[0]
        if batch not in self._counts:
            self._counts[batch] = torch.full_like(loss.detach(), batch, dtype=wide(loss))
        return Target(loss, (seen.x,), True, times=self._counts[batch])

    def _sharded(self, made: Made, loss: Tensor, acting: Acting) -> Tensor:
        """Return the loss with the penalties, of weights that FSDP2 has sharded."""
        for penalty in acting.values():
            again = partial(self.again, self.module, made, penalty)  # the same for all: the loss
        given = Computed(loss, again, made.state)
        loss, found = self._shards.terms(acting, given, self._at)
        total = loss
        for term in found.values():
            total = total if term is None else term.added_to(total)
        self._log(total, found)
        return total

    def _call(
        self, name: str, penalty: GradientPenalty, made: Made, seen: Seen, value: Any
    ) -> list[Any]:
        """Return what a penalty is called with."""
        again = partial(self.again, self.module, made, penalty)
        if asked.in_weights(penalty):
            if asked.one_by_one(penalty):
                return [partial(losses_of, self.module, made, self.traces), self.net]
            window = self._window(name, penalty) if penalty.scope in POOLED else None
            f = Computed(value, again, made.state, window=window)
            named = getattr(penalty.wrt, "match", "*") != "*"
            return [f, self.net if named else self._all()]
        wrt, mean = penalty.wrt, penalty.of == "loss"
        moves = penalty.at.moves or asked.calls_net(penalty)
        x = seen.activations[wrt.name] if isinstance(wrt, Named) and not moves else seen.x
        assert x is not None
        if not moves:
            return [Computed(value, again, made.state, mean=mean), x]
        if asked.calls_net(penalty):
            return [self.net, x.detach()]
        if isinstance(wrt, Named):  # L there, for each sample, has the right sum
            return [lambda z: again(z).expand(len(z)), x.detach(), self.net]
        return [Computed(None, again, made.state, mean=True), x.detach()]

    def _all(self) -> list[Tensor]:
        """Return the parameters of the net, which are looked up once."""
        if not self._parameters:
            self._parameters = list(self.net.parameters())
        return self._parameters

    def again(self, module: nn.Module, made: Made, penalty: GradientPenalty, *xs: Tensor) -> Any:
        """Return what a penalty differentiates, of a step made again, at other inputs if given.

        Args:
            module: the LightningModule, named for the isolation of what is called.
            made: the step.
            penalty: says what is differentiated.
            *xs: the input, or the activation, to compute with.

        Returns:
            The loss, or what the net gives.
        """
        name = "" if penalty.at.moves else getattr(penalty.wrt, "name", "")
        moved = {name: xs[0]} if xs else None
        with self.traces.none(), self._watched(asked.needs({"": penalty}), moved) as seen:
            output = made.step(*made.args, **made.kwargs)
        return asked.value(penalty, seen, loss_of(output))

    def _isolated(self, made: Made, penalty: GradientPenalty) -> Tensor:
        """Return the loss of a step made again, for a window."""
        twice = not penalty.estimator.first_order
        with isolated(self.module, made.state, self.module.device, penalty.order, twice=twice):
            return self.again(self.module, made, penalty)

    def _window(self, name: str, penalty: GradientPenalty) -> Window:
        size = self.trainer.accumulate_grad_batches
        return self.windows.setdefault(name, Window(size, ranks=penalty.scope == "global"))

    def _log(self, total: Tensor, terms: Mapping[str, Terms | None]) -> None:
        """Log the total and the penalties, on the steps that the trainer logs."""
        every = self.trainer.log_every_n_steps
        if self._at is not None and (every == 0 or (self._at + 1) % every):
            return
        log = self.module.log
        log("train/loss_total", total.detach())
        for name in self.penalties:
            term = terms.get(name)
            log(f"penalty/{name}", 0.0 if term is None else term.penalty.detach())
            log(f"penalty/{name}/weight", 0.0 if term is None else term.weight)
            if term is not None:
                log(f"penalty/{name}/norm", term.norms.detach().mean())
