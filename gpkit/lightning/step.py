"""A training step with penalties."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.calls import Computed
from gpkit.captures import Named
from gpkit.isolation import double_backward, isolated, random_state
from gpkit.lightning import asked
from gpkit.lightning.findings import at_step, refuse
from gpkit.lightning.passes import activation_names
from gpkit.lightning.probe import Seen, watched
from gpkit.lightning.replay import Made, Step, loss_of, losses_of, untraced, with_loss_of
from gpkit.penalty import GradientPenalty, Terms
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
        self.net: nn.Module | None = dict(module.named_modules()).get(name or "")
        self.title = f"the submodule {name!r}" if name else f"the {type(module).__name__} itself"
        self.problems = problems
        self.windows: dict[str, Window] = {}
        self._drawn: tuple[int, dict[str, int]] = (-1, {})  # a batch, and the draws before it
        self._first = True
        self._manual: tuple[Made, Seen] | None = None
        self._calls = 0

    def __call__(self, step: Step, *args: Any, **kwargs: Any) -> Any:
        """Run a training step, and return what it gives with the penalties added to the loss."""
        acting = self._acting()
        if not acting and not self.problems:
            return step(*args, **kwargs)
        self._repeat_draws(acting)
        made = Made(step, args, kwargs)
        if any(map(asked.replays, acting.values())):
            made.state = random_state(self.module.device)
        try:
            with self._watched(acting.values()) as seen:
                output = step(*args, **kwargs)
        except Exception as error:
            refuse(self.problems, error)  # of which the error may be a consequence
            raise
        loss = loss_of(output)
        if loss is None:
            return output  # Lightning skips the step
        return with_loss_of(output, self._penalised(made, seen, loss, acting))

    def manual(self, step: Step, *args: Any, **kwargs: Any) -> Any:
        """Run a training step that optimises manually, and watch it."""
        self._calls = 0
        with self._watched(self.penalties.values()) as seen:
            self._manual = Made(step, args, kwargs), seen
            return step(*args, **kwargs)

    def backward(self, backward: Step, which: int, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Make a ``manual_backward`` call, with the penalties added if it is the chosen one."""
        if self._calls == which and self._manual is not None:
            loss = self._penalised(*self._manual, loss, self._acting())
        self._calls += 1
        backward(loss, *args, **kwargs)

    def _step(self) -> int | None:
        """Return the optimiser step. With optimisers of the module's own, penalties count."""
        return self.trainer.global_step if self.module.automatic_optimization else None

    def _acting(self) -> Acting:
        """Return the penalties that act on this step; the others count it."""
        step, acting = self._step(), {}
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
            for name, draws in self._drawn[1].items():
                self.penalties[name].draws = draws
        else:
            self._drawn = now, {name: penalty.draws for name, penalty in acting.items()}

    @contextmanager
    def _watched(
        self, penalties: Iterable[GradientPenalty], moved: Mapping[str, Tensor] | None = None
    ) -> Iterator[Seen]:
        """Watch the net, on kernels that the penalties can differentiate."""
        penalties = [p for p in penalties if self.net is not None]
        twice = [p.order for p in penalties if not p.estimator.first_order]
        x = any(map(asked.wants_input, penalties))
        output = any(map(asked.wants_output, penalties))
        named = dict.fromkeys(
            n for p in penalties if not asked.calls_net(p) for n in activation_names(p)
        )
        with ExitStack() as stack:
            if twice:
                stack.enter_context(double_backward(max(twice)))
            if twice or x or output or named:  # a compiled net has no hooks, no double backward
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            net = self.net or self.module
            yield stack.enter_context(
                watched(net, self.title, x=x, output=output, activations=named, moved=moved)
            )

    def _penalised(self, made: Made, seen: Seen, loss: Tensor, acting: Acting) -> Tensor:
        """Return the loss with the penalties that act."""
        if self._first or seen.problems:
            wants_x = any(map(asked.wants_input, acting.values()))
            found = at_step(self.module, self.title, loss, seen, wants_x=wants_x)
            refuse([*self.problems, *found])
            self._first = not acting
        step, scale = self._step(), self._scale(loss)
        last = not self.trainer.fit_loop._should_accumulate()
        pooled = {n: p for n, p in acting.items() if p.scope in POOLED}
        waiting = {} if last else pooled
        base, differing = loss, [n for n, p in acting.items() if asked.differs(p)]
        if waiting or differing:
            windows = [
                (self._window(n, p), partial(self._isolated, made, p)) for n, p in waiting.items()
            ]
            retain = bool(acting.keys() - waiting.keys() - set(differing))
            base = summarised(loss, scale, retain=retain, windows=windows)
        terms: dict[str, Terms | None] = dict.fromkeys(self.penalties)
        total = base
        for name, penalty in acting.items():
            if name in waiting:
                penalty.count_step(step)
                continue
            value = base if name in differing else asked.value(penalty, seen, loss)
            f, *args = self._call(name, penalty, made, seen, value)
            terms[name] = term = penalty.act(f, *args, step=step, scale=scale)
            assert term is not None
            total = total + term.penalty
            measure = getattr(penalty.weight, "measure", None)
            if measure is not None:
                measure(base, term.penalty, self.module.parameters(), penalty.step - 1)
        divisor = max((p.loss_scale() for p in self.penalties.values()), default=1.0)
        total = total if divisor == 1 else total / divisor
        if last:
            self.windows.clear()
            self._log(total, terms)
        return total

    def _call(
        self, name: str, penalty: GradientPenalty, made: Made, seen: Seen, value: Any
    ) -> list[Any]:
        """Return what a penalty is called with."""
        again = partial(self.again, self.module, made, penalty)
        if asked.in_weights(penalty):
            if asked.one_by_one(penalty):
                return [partial(losses_of, self.module, made), self.net]
            window = self._window(name, penalty) if penalty.scope in POOLED else None
            return [Computed(value, again, made.state, window=window), self.net]
        wrt, mean = penalty.wrt, penalty.of == "loss"
        x = seen.activations[wrt.name] if isinstance(wrt, Named) else seen.x
        assert x is not None
        if asked.calls_net(penalty):
            return [self.net, x.detach()]
        if penalty.at.moves:  # L there, for each sample, has the right sum
            return [lambda z: again(z).expand(len(z)), x.detach()]
        return [Computed(value, again, made.state, mean=mean), x]

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
        moved = {getattr(penalty.wrt, "name", ""): xs[0]} if xs else None
        with untraced(module), self._watched([penalty], moved) as seen:
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

    def _scale(self, loss: Tensor) -> Tensor | float:
        """Return the scale of the gradient scaler, without waiting for the device."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device))

    def _log(self, total: Tensor, terms: Mapping[str, Terms | None]) -> None:
        """Log the total and the penalties, on the steps that the trainer logs."""
        every = getattr(self.trainer, "log_every_n_steps", 0)
        step = self._step()
        if step is not None and (every == 0 or (step + 1) % every):
            return
        log = self.module.log
        log("train/loss_total", total.detach())
        for name, term in terms.items():
            log(f"penalty/{name}", 0.0 if term is None else term.penalty.detach())
            log(f"penalty/{name}/weight", 0.0 if term is None else term.weight)
            if term is not None:
                log(f"penalty/{name}/norm", term.norms.mean())
