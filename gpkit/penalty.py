"""Penalty: the base class, with the weight, the step count, the seed and the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.distributed import tied
from gpkit.autodiff.random import derived_seed, device_of, has_ranks, rank
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes.call import Arguments, listed
from gpkit.axes.given.given import IS_GIVEN, as_given
from gpkit.axes.weight import Schedule, Weight, as_weight
from gpkit.findings.seen import SeenNets
from gpkit.formula import Terms


class Penalty:
    """A term to add to a loss: λ(t) times a value.

    A subclass defines one method, `evaluate`.

    Args:
        weight: λ >= 0, or a schedule: a function of the optimiser step.
        every: act on every k-th step, with the weight multiplied by k (lazy regularisation).
        seed: the seed of the penalty's random numbers; None uses torch's initial seed. Each rank
            of a distributed run draws its own numbers.
        name: the name in logs.

    Raises:
        ValueError: if an argument is out of range.

    >>> import torch
    >>> from gpkit.formula import Terms
    >>> class weight_decay(Penalty):
    ...     def evaluate(self, f, args, real, fake, weight, seed, scale=None, *, acts=False):
    ...         n2 = f.square().sum().reshape(1)
    ...         return Terms(n2, n2, weight, n2.mean())
    >>> weight_decay(weight=0.1)(torch.tensor([3.0, 4.0])).item()  # 0.1·25
    2.5
    """

    shortcuts: Any = None  # of calls that repeat an earlier one
    compares = False  # whether `evaluate` has an argument ``given``, see `gpkit.axes.given.Given`

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        every: int = 1,
        seed: int | None = None,
        name: str = "penalty",
    ) -> None:
        self.weight = weight
        self.every = checks.integer("every=...", every, 1)
        self.seed = seed if seed is None else checks.integer("seed=...", seed, 0)
        self.name = name
        self.step = self.evaluated_at = self.draws = 0
        self.seen = SeenNets()

    @property
    def weight(self) -> float | Schedule:
        """λ, as it was passed: a number or a schedule."""
        return self._given

    @weight.setter
    def weight(self, weight: float | Schedule) -> None:
        self._given = weight if callable(weight) else checks.number("weight=...", weight, 0)
        self._schedule = as_weight(weight) if callable(weight) else None
        self.adapts = getattr(type(self._schedule), "observe", None) not in (None, Weight.observe)

    def __call__(
        self,
        f: Any,
        *args: Any,
        real: Any = None,
        fake: Any = None,
        target: Any = None,
        metric: Any = None,
        sample_weight: Tensor | None = None,
        groups: Tensor | None = None,
        step: int | None = None,
        scale: Tensor | float | None = None,
    ) -> Tensor:
        """Return the penalty, a scalar to add to the loss, and count a step.

        Args:
            f: a tensor, whose graph is reused, or a callable. Input penalty: it is, or returns,
                one value per sample, ``[B]`` or ``[B, 1]``, or outputs ``[B, *O]``. Weight
                penalty: a loss, or a closure that returns it.
            *args: input penalty: the samples ``[B, *S]``, a tuple or dict of them for several.
                Weight penalty: the module or its parameters.
            real: real samples, ``[B, *S]``.
            fake: fake samples, ``[B, *S]``.
            target: g: n is the norm of D f - g. The shape is that of the derivative, ``[B, *S]``
                for one output, ``[B, m, *S]`` for m; for several inputs or parameters a list.
            metric: A: n is the norm of A ∘ (D f - g). A constant that broadcasts to the derivative,
                such as a mask ``[*S]``, or a function x -> A.
            sample_weight: w ``[B]``: the mean over samples is Σ w v / Σ w. A weight penalty of
                losses takes the gradient of their weighted mean. For losses of steps also
                ``[B, T]``, such as the mask of padded sequences: the loss of a sample is
                Σ_t w_it ℓ_it, and the mean is over the samples with a step whose weight is not 0.
            groups: an index ``[N]`` of the group of each row, for inputs ``[N, *S]`` and outputs
                ``[G, ...]``: one norm over all rows of a group, such as the nodes of a graph.
            step: the optimiser step, for the schedule and ``every``; None counts the calls.
            scale: the factor of a gradient scaler, for float16: ``scale·f`` is differentiated, and
                divided by ``scale``, so that the gradient does not underflow. The value stays.

        Returns:
            A scalar. If the weight is zero or ``every`` skips the step, it is zero and nothing is
            evaluated. Under no_grad it has no graph.

        Raises:
            RuntimeError: if the penalty depends on no trained parameter, or if torch has no
                derivative, or a wrong one, through an operation of the net.
            TypeError: if an argument has the wrong type.
            ValueError: if the shapes do not fit.
        """
        plain = scale is groups is target is metric is sample_weight is None
        known = self.shortcuts if plain and not (TRACES or RECORDS) else None
        if known is not None and known.known and (earlier := known.of(f)) is not None:
            args, before = listed(args), (self.step, self.draws)
            weight, seed = self.counted(step), self.next_seed()
            again = earlier.penalty(self, Arguments(f, args, real, fake, weight, seed))
            if again is not None:
                return again
            self.step, self.draws = before
        given: Any = {"target": target, "metric": metric, "sample_weight": sample_weight}
        given |= {"groups": groups, "step": step, "scale": scale}
        terms = self.act(f, *args, real=real, fake=fake, **given)
        if terms is None:
            return torch.zeros((), device=device_of(f, args, real, fake))
        ties = terms.outputs and has_ranks() and terms.reduced.requires_grad
        return tied(terms.penalty, terms.outputs) if ties else terms.penalty

    def act(
        self,
        f: Any,
        *args: Any,
        real: Any = None,
        fake: Any = None,
        step: int | None = None,
        scale: Tensor | float | None = None,
        **given: Any,
    ) -> Terms | None:
        """Return the terms of the penalty, and count a step. Takes the arguments of a call.

        Returns:
            The terms, with values to log; None if the weight is zero or ``every`` skips the step.
        """
        given = as_given(given, self) if any(map(IS_GIVEN, given.values())) else {}
        run: Any = partial(self.evaluate, f, args, real, fake, scale=scale, acts=True, **given)
        if compiling := TRACES or RECORDS:
            return compiling[-1].act(self, run, step)
        weight = self.counted(step)
        return self.observed(run(weight, self.next_seed())) if weight else None

    def act_with(self, evaluate: Callable[[float], Terms], step: int | None = None) -> Terms | None:
        """Return the terms that ``evaluate`` returns for the weight of a step, and count the step.

        Args:
            evaluate: weight -> terms. It is not called if the weight is zero.
            step: the optimiser step; None counts the calls.

        Returns:
            The terms, or None if the penalty does not act on this step.
        """
        weight = self.counted(step)
        return None if weight == 0 else self.observed(evaluate(weight))

    def counted(self, step: int | None) -> float:
        """Count a step, and return its weight."""
        self.evaluated_at = self.step if step is None else step
        self.step = self.evaluated_at + 1
        return self.weight_at(self.evaluated_at)

    def observed(self, terms: Terms) -> Terms:
        """Return the terms, after an adaptive weight has seen them."""
        if self._schedule is not None and torch.is_grad_enabled():
            norms = terms.norms if terms.sample_weight is None else terms.mean_norm.reshape(1)
            self._schedule.observe(norms, self.evaluated_at)
        return terms

    def terms(
        self,
        f: Any,
        *args: Any,
        real: Any = None,
        fake: Any = None,
        step: int | None = None,
        **given: Any,
    ) -> Terms:
        """Return the norms and values of the penalty. Takes the arguments of a call.

        It evaluates on any step, also if ``every`` skips it, counts none, updates no running
        average, and does not check that the penalty trains anything. The random numbers are those
        of the next call. ``weight`` is that of the latest step that ``every`` does not skip.
        """
        step = self.evaluated_at = self.step if step is None else step
        weight = self.weight_at(step - step % self.every)
        seed = self._seed_of(self.draws + 1)
        compared: Any = as_given(given, self) if any(map(IS_GIVEN, given.values())) else {}
        return self.evaluate(f, args, real, fake, weight, seed, **compared)

    def evaluate(
        self,
        f: Any,
        args: tuple[Any, ...],
        real: Any,
        fake: Any,
        weight: float,
        seed: int,
        scale: Tensor | float | None = None,
        *,
        acts: bool = False,
    ) -> Terms:
        """Return the terms for a weight.

        Args:
            f: the first argument of the call.
            args: the other positional arguments.
            real: real samples, if passed by keyword.
            fake: fake samples, if passed by keyword.
            weight: the factor of the reduced value.
            seed: the seed of this evaluation's random numbers.
            scale: the factor of a gradient scaler.
            acts: whether it trains: running averages move, and one that trains nothing is refused.

        Returns:
            The terms.

        Raises:
            NotImplementedError: if a subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(...)")

    def skip(self, step: int | None = None) -> None:
        """Count a step on which the penalty is not evaluated.

        Args:
            step: the optimiser step; None counts the calls.
        """
        self.step = (self.step if step is None else step) + 1

    def weight_at(self, step: int) -> float:
        """Return the factor of the reduced value at an optimiser step: zero if it is skipped."""
        if step % self.every:
            return 0.0
        weight = self._given if self._schedule is None else self._schedule(step)
        return float(weight) * self.every  # type: ignore[arg-type]

    @property
    def effect_confirmed(self) -> bool:
        """Whether the penalty has been found to train a net."""
        return bool(self.seen)

    def acts_at(self, step: int | None = None) -> bool:
        """Whether the penalty acts at an optimiser step; None is the next step."""
        return self.weight_at(self.step if step is None else step) != 0

    def loss_scale(self, step: int | None = None) -> float:
        """Return the number that divides the total loss: 1, except for a `rescaled` weight.

        Args:
            step: the optimiser step; None is the step of the last call.
        """
        step = max(self.step - 1, 0) if step is None else step
        return 1.0 if self._schedule is None else self._schedule.loss_scale(step)

    @property
    def measures(self) -> bool:
        """Whether the weight adapts to the gradients of loss and penalty, see `measure`."""
        return self._schedule is not None and self._schedule.measures

    def measure(self, loss: Tensor, terms: Terms, parameters: Iterable[Tensor]) -> None:
        """Let a weight that adapts to gradients measure those of the loss and the penalty.

        Args:
            loss: the scalar loss without penalties.
            terms: the penalty's terms at the last step.
            parameters: the trained parameters.
        """
        if self._schedule is not None and torch.is_grad_enabled():
            self._schedule.measure(loss, terms.penalty / self.every, parameters, self.step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers.

        The seed and ``draws``, the number of evaluated calls, determine the random numbers. An
        axis with a state, such as a running average, has it under its name in "axes".
        """
        state = {"step": self.step, "draws": self.draws, "seed": self.seed}
        axes = {name: axis.state_dict() for name, axis in self._with_state().items()}
        axes = {name: own for name, own in axes.items() if own}
        return {**state, "axes": axes} if axes else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. An axis without an entry in it is left as it is."""
        self.step, self.draws, self.seed = state["step"], state["draws"], state["seed"]
        for name, axis in self._with_state().items():
            if name in state.get("axes", {}):
                axis.load_state_dict(state["axes"][name])

    def axes(self) -> dict[str, Any]:
        """Return the choices on the axes by name."""
        return {"weight": self.weight, "every": self.every}

    def _with_state(self) -> dict[str, Any]:
        """Return the axes with a state, except modules, whose state their owner saves."""
        kept = {n: a for n, a in self.axes().items() if not isinstance(a, nn.Module)}
        return {n: a for n, a in kept.items() if hasattr(a, "state_dict")}

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={axis!r}" for name, axis in self.axes().items())
        return f"{type(self).__name__}({axes})"

    def next_seed(self) -> int:
        """Return the seed of the next evaluation, a function of the state and the rank only."""
        self.draws += 1
        return self._seed_of(self.draws)

    def _seed_of(self, draws: int) -> int:
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**63
        return derived_seed(self.seed, rank(), draws)
