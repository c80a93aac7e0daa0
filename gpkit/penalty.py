"""GradientPenalty: seven axes, composed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from gpkit import checks, pixels, window
from gpkit.calls import Of
from gpkit.draws import Source, derived_seed, rank
from gpkit.effect import acts
from gpkit.estimators import ESTIMATORS, exact, projection
from gpkit.evaluation import device_of, evaluate
from gpkit.forms import FORMS, Form
from gpkit.points import At, as_at
from gpkit.reductions import REDUCTIONS
from gpkit.schedules import Schedule
from gpkit.targets import Estimator, Target
from gpkit.terms import Terms
from gpkit.together import with_loss
from gpkit.variables import VARIABLES, Variables, inputs, weights

AXES = ["of", "wrt", "scope", "order", "form", "at", "estimator", "reduce", "weight", "every"]


class Axes(TypedDict, total=False):
    """The arguments of `GradientPenalty` but for the weight, for functions that pass them on."""

    of: Of
    wrt: str | Variables
    scope: str | None
    order: int
    form: str | Form
    at: str | At | Callable[[Any, Any], Any]
    estimator: str | Estimator | None
    reduce: str
    every: int
    seed: int | None
    name: str


class GradientPenalty:
    r"""A penalty on the norm of a derivative, to add to a loss.

    .. math:: \lambda(t) \; \frac1G \sum_g \mathrm{form}\Big(\big\|
              D^k_{\mathrm{wrt}} \, \mathrm{mean}_{i \in g} \, \mathrm{of}(z_i) \big\|\Big),
              \quad z_i \text{ taken at } \texttt{at}

    Call it with a tensor whose graph is there (no second forward), or with a callable, which is
    evaluated where ``at`` says. A call never touches ``.grad``, the buffers of the modules that it
    runs (batch-norm statistics), the global random numbers, or the requires_grad of your tensors.
    A forward of its own draws dropout masks of its own.

    Args:
        of: what is differentiated. "output": all that the function gives, so that several outputs
            have the Frobenius norm of their Jacobian; "loss": the same, but one value per sample is
            required; "sampled_loss": the cross-entropy of logits ``[B, C]`` with labels drawn from
            them; a function of what the callable gives, as ``lambda out: out["logits"]``; or
            ``gpkit.activation("encoder.3")``, the output of a submodule.
        wrt: with respect to what: "input", "weight", ``gpkit.weights("head.*")``, or
            ``gpkit.activation("encoder.3")``.
        scope: the groups: what is averaged before the norm is taken. For inputs "sample", or
            "pixel": every pixel of ``[B, C, *S]`` has the norm of its C channels, at order 1; for
            weights "batch", the default, "sample", "accumulated" (all micro-batches of an
            optimiser step, in `GradientPenaltyCallback`), or "global": of all ranks as well, for
            data parallelism that averages their gradients, as DDP does. At order 1.
        order: k >= 1, of the derivative. 1 is the gradient.
        form: what is done to the norm n: "squared" n², "norm" n, ``gpkit.two_sided(c)`` (n - c)²,
            ``gpkit.one_sided(c)`` max(0, n - c)², ``gpkit.power(p)`` n^p; each takes
            ``norm="l1"`` or ``norm="linf"`` instead of "l2".
        at: where: "data", "real", "fake", "interpolate", "perturb", an object such as
            ``gpkit.perturb(0.5)``, ``gpkit.uniform(-1, 1)`` or ``gpkit.mixture("real", "fake")``,
            or a function ``(real, fake) -> points``.
        estimator: "exact"; "projection" or ``gpkit.projection(n)``; "finite_difference" or
            ``gpkit.finite_difference(step)``; "taylor" or ``gpkit.taylor(n)``; or for the largest
            singular value "power_iteration" or ``gpkit.power_iteration(n)``. None is "exact", but
            for order >= 2 in the weights, whose full derivative is out of reach, "projection".
        reduce: "mean" over the groups, or "max": the largest of the micro-batch.
        weight: λ >= 0, or a schedule: a function of the optimiser step.
        every: act on every k-th step, with the weight multiplied by k (lazy regularisation).
        seed: of the penalty's own random numbers; None takes torch's initial seed. Each rank of
            a distributed run draws its own.
        name: what it is called in logs; a preset's own name if it is one.

    Raises:
        ValueError: if an axis has a value that it cannot have.

    >>> import gpkit, torch
    >>> critic = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> penalty = gpkit.GradientPenalty(form=gpkit.two_sided(1.0), weight=10.0)
    >>> penalty(critic, torch.zeros(8, 2)).item()  # 10 (5 - 1)²
    160.0
    """

    def __init__(
        self,
        *,
        of: Of = "output",
        wrt: str | Variables = "input",
        scope: str | None = None,
        order: int = 1,
        form: str | Form = "squared",
        at: str | At | Callable[[Any, Any], Any] = "data",
        estimator: str | Estimator | None = None,
        reduce: str = "mean",
        weight: float | Schedule = 1.0,
        every: int = 1,
        seed: int | None = None,
        name: str = "penalty",
    ) -> None:
        self.of = (
            of if callable(of) else checks.choice("of=...", of, ("output", "loss", "sampled_loss"))
        )
        self.wrt: Variables = checks.piece("wrt=...", wrt, VARIABLES, Variables)
        self.scope = checks.choice("scope=...", scope or self.wrt.scopes[0], self.wrt.scopes)
        self.order = checks.integer("order=...", order, 1)
        self.form: Form = checks.piece("form=...", form, FORMS, Form)
        self.at = as_at("at=...", at)
        if estimator is None:
            estimator = projection() if order > 1 and isinstance(self.wrt, weights) else exact()
        self.estimator: Estimator = checks.piece("estimator=...", estimator, ESTIMATORS, Estimator)
        self.estimator.check(self.order, self.form.norm, isinstance(self.wrt, inputs))
        window.require_gradient(self.scope, self.order, self.estimator)
        if self.scope == "pixel":
            pixels.require_axes(self.order, self.estimator, (exact, projection))
        self.reduce = checks.choice("reduce=...", reduce, REDUCTIONS)
        self.weight = weight if callable(weight) else checks.number("weight=...", weight, 0)
        self.every = checks.integer("every=...", every, 1)
        self.seed = seed if seed is None else checks.integer("seed=...", seed, 0)
        self.name = name
        self.step = 0
        self.draws = 0
        self.seen_to_act = False

    def __call__(
        self,
        f: Any,
        *args: Any,
        real: Any = None,
        fake: Any = None,
        step: int | None = None,
        scale: Tensor | float | None = None,
    ) -> Tensor:
        """Return the penalty, a scalar to add to the loss, and count a step.

        Args:
            f: a tensor, whose graph is reused, or a callable. For an input penalty values per
                sample: ``[B]``, ``[B, 1]`` or outputs ``[B, *O]``; for a weight penalty a loss,
                or a closure that returns it.
            *args: the samples ``[B, *S]`` (a tuple of them for several inputs); for a weight
                penalty the module or its parameters.
            real: real samples, ``[B, *S]``.
            fake: fake samples, ``[B, *S]``.
            step: the optimiser step, for the schedule and ``every``; None counts the calls.
            scale: of a gradient scaler, under float16: the gradient inside of the penalty is taken
                of ``scale·f`` and divided by ``scale``, so that it does not round to zero. The
                penalty's value does not depend on it.

        Returns:
            A scalar. It is zero, and nothing is evaluated, where the weight is zero or
            ``every`` skips the step. Outside of grad mode it has no graph.

        Raises:
            RuntimeError: if it would train nothing: it does not depend on any trained parameter;
                or if torch has no derivative, or a wrong one, through an operation of the net.
            TypeError: if the arguments are not of these kinds.
            ValueError: if their shapes do not fit.
        """
        terms = self.act(f, *args, real=real, fake=fake, step=step, scale=scale)
        return (
            torch.zeros((), device=device_of(f, args, real, fake))
            if terms is None
            else terms.penalty
        )

    def act(
        self,
        f: Any,
        *args: Any,
        real: Any = None,
        fake: Any = None,
        step: int | None = None,
        scale: Tensor | float | None = None,
    ) -> Terms | None:
        """Return the terms of a call, and count a step; None where the call would be zero.

        Args:
            f: as in a call.
            *args: as in a call.
            real: as in a call.
            fake: as in a call.
            step: as in a call.
            scale: as in a call.

        Returns:
            The terms, or None where the weight is zero or ``every`` skips the step.
        """
        weight = self.count_step(step)
        if weight == 0:
            return None
        terms, targets = self._evaluate(f, args, real, fake, weight, scale, observe=True)
        if torch.is_grad_enabled() and not (self.seen_to_act and terms.reduced.requires_grad):
            self._require_effect(terms, targets)
        self.observe(terms)
        return terms

    def act_on(
        self, target: Target, step: int | None = None, scale: Tensor | float | None = None
    ) -> Terms:
        """Return the terms of a target, and count a step: a call without the reading of arguments.

        Args:
            target: what is differentiated. The estimator draws nothing, the step is not skipped,
                and a call with such a graph has been seen to act.
            step: as in a call.
            scale: as in a call.

        Returns:
            The terms.
        """
        self.draws += 1  # as a call does: which way it went is not to be seen in the state
        terms = self.terms_of([target], None, self.count_step(step), scale, observe=True)
        self.observe(terms)
        return terms

    def with_loss(self, closure: Callable[[], Any], net: Any, *, step: int | None = None) -> Tensor:
        """Return the loss and the penalty in the weights as one scalar, and count a step.

        The forward that gives the loss is the training forward, which moves batch-norm statistics
        and random numbers, and the penalty makes use of it: by finite differences, a step takes
        two forward and backward passes in all, which have been made when this returns; its
        backward only hands the gradient out, and a graph behind the closure is used up.

        >>> import gpkit, torch
        >>> w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> penalty = gpkit.weight_grad_norm(weight=0.1, estimator="finite_difference")
        >>> penalty.with_loss(lambda: (w**2).sum() / 2, [w]).item()  # 25 / 2 + 0.1·25
        15.0

        Args:
            closure: gives the loss ``[]``, or losses ``[B]``, whose mean is trained on.
            net: the module, or its parameters.
            step: as in a call.

        Returns:
            A scalar.

        Raises:
            TypeError: if the penalty is not in the weights.
            RuntimeError: as a call does.
        """
        return with_loss(self, closure, net, step)

    def terms(
        self, f: Any, *args: Any, real: Any = None, fake: Any = None, step: int | None = None
    ) -> Terms:
        """Return the norms and values behind the penalty. It takes the arguments of a call.

        It acts on every step, whatever ``every`` says, counts none, and does not ask whether the
        penalty trains anything; a running average stays as it is. ``weight`` is that of the last
        step, up to this one, on which a call acts.
        """
        step = self.step if step is None else step
        return self._evaluate(f, args, real, fake, self.weight_at(step - step % self.every))[0]

    def measure(
        self, targets: list[Target], rng: Source | None, *, observe: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return n² and values ``[G]``: the formula alone, as torch.compile can trace it.

        Args:
            targets: what is differentiated.
            rng: of an estimator that draws; None where it does not.
            observe: whether the form's state, if it has one, takes the norms in.

        Returns:
            The squared norms and the values.
        """
        axes: Any = (self.order, self.form.norm, rng)
        parts = [self.estimator.squared_norms(target, *axes) for target in targets]
        n2 = torch.cat(parts) if len(parts) > 1 else parts[0]
        scale = targets[0].scale
        if scale is not None:
            n2 = n2 / scale / scale
        if observe:
            self.form.observe(n2)
        return n2, self.form(n2)

    def total(self, values: Tensor) -> Tensor:
        """Return one number for the values ``[G]``: their mean or maximum."""
        return values.reshape(()) if values.shape[0] == 1 else REDUCTIONS[self.reduce](values)

    def count_step(self, step: int | None = None) -> float:
        """Count a step, the given or the next one, and return the weight on it."""
        self.step = self.step if step is None else step
        weight = self.weight_at(self.step)
        self.step += 1
        return weight

    def weight_at(self, step: int) -> float:
        """Return the factor of the reduced value at an optimiser step: zero where it is skipped."""
        if step % self.every:
            return 0.0
        weight = self.weight(step) if callable(self.weight) else self.weight
        return float(weight) * self.every

    def loss_scale(self, step: int | None = None) -> float:
        """Return what the whole loss is divided by: 1 but for a `rescaled` weight.

        Args:
            step: the optimiser step; None is that of the last call.
        """
        scale = getattr(self.weight, "loss_scale", None)
        return 1.0 if scale is None else scale(max(self.step - 1, 0) if step is None else step)

    def observe(self, terms: Terms) -> None:
        """Show the norms of the last call to a weight that adapts to them."""
        observe = getattr(self.weight, "observe", None)
        if observe is not None and torch.is_grad_enabled():
            observe(terms.norms, self.step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain numbers. The seed and the count of draws are the generator.

        An axis that has a state of its own, as a running average, is under its name in "axes".
        """
        state = {"step": self.step, "draws": self.draws, "seed": self.seed}
        axes = {name: axis.state_dict() for name, axis in self._stateful().items()}
        axes = {name: own for name, own in axes.items() if own}
        return {**state, "axes": axes} if axes else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. An axis that it does not have begins at its beginning."""
        self.step, self.draws, self.seed = state["step"], state["draws"], state["seed"]
        for name, axis in self._stateful().items():
            if name in state.get("axes", {}):
                axis.load_state_dict(state["axes"][name])

    def _stateful(self) -> dict[str, Any]:
        """Return the axes that may have a state. A module's is its owner's to save."""
        axes = {name: getattr(self, name) for name in AXES}
        kept = {n: a for n, a in axes.items() if not isinstance(a, nn.Module)}
        return {n: a for n, a in kept.items() if hasattr(a, "state_dict")}

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={getattr(self, name)!r}" for name in AXES)
        return f"GradientPenalty({axes})"

    _evaluate = evaluate

    def terms_of(
        self,
        targets: list[Target],
        rng: Source | None,
        weight: float,
        scale: Tensor | float | None,
        *,
        observe: bool,
    ) -> Terms:
        """Return the terms of targets.

        Args:
            targets: what is differentiated.
            rng: of an estimator that draws.
            weight: the factor of the reduced value.
            scale: of a gradient scaler, or None.
            observe: as in `measure`.

        Returns:
            The terms.
        """
        if scale is not None:
            targets = [target.scaled(scale) for target in targets]
        if targets[0].mean and self.estimator.first_order:
            targets = [replace(target, share=self._share) for target in targets]
        n2, values = self.measure(targets, rng, observe=observe)
        return Terms(n2, values, weight, self.total(values))

    def _share(self, squared_norms: Tensor) -> Tensor:
        """Return the derivative of the reduced value in n² ``[G]``: constants."""
        n2 = squared_norms.detach().requires_grad_()
        return torch.autograd.grad(self.total(self.form(n2)), n2)[0]

    def next_seed(self) -> int:
        """Return the seed of the next evaluation: a function of the state and the rank alone."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**63
        self.draws += 1
        return derived_seed(self.seed, rank(), self.draws)

    def _require_effect(self, terms: Terms, targets: list[Target]) -> None:
        """Refuse a penalty that trains nothing though there is something to train."""
        self.seen_to_act = acts(self, terms, targets) or self.seen_to_act
