"""GradientPenalty: one choice on each axis, evaluated by the formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from gpkit import checks, formula
from gpkit.autodiff.activations import names
from gpkit.autodiff.isolation import FORWARDS
from gpkit.autodiff.random import Source, device_of, source
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes import scope as scopes
from gpkit.axes.activation import activation, as_wrt
from gpkit.axes.at import At, as_at
from gpkit.axes.call import Arguments, Call, listed
from gpkit.axes.form import Form, as_form
from gpkit.axes.given.given import Given, completed, weights_of
from gpkit.axes.given.keys import Keys, Metric, as_keys, as_metric
from gpkit.axes.given.named import by_name
from gpkit.axes.mixtures import part
from gpkit.axes.of import Of
from gpkit.axes.parameters import weights
from gpkit.axes.weight import Schedule
from gpkit.axes.wrt import Variables, inputs
from gpkit.estimators import ESTIMATORS
from gpkit.estimators.base import Estimator, Target, Targets
from gpkit.estimators.exact import exact
from gpkit.estimators.projection import projection
from gpkit.finding import FoundError
from gpkit.findings.derivatives import NormLayerError, require_derivatives
from gpkit.findings.estimate import warn_of_bias
from gpkit.findings.trained import trains
from gpkit.formula import Terms
from gpkit.penalty import Penalty
from gpkit.shortcut.calls import Shortcuts
from gpkit.with_loss import with_loss

VARIABLES: dict[str, type[Variables]] = {"input": inputs, "weight": weights}
AXES = (
    "of", "wrt", "scope", "order", "form", "at", "estimator", "forward", "reduce", "metric",
    "given", "subsample", "weight", "every",
)  # fmt: skip
NO_GRAPH = (
    "the penalty has nothing to differentiate: the tensor has no graph. Was it computed under "
    "no_grad, detached, or is it a gradient taken without create_graph=True?"
)


class Axes(TypedDict, total=False):
    """Keyword arguments of `GradientPenalty` except ``weight``, for presets that forward them."""

    of: Of
    wrt: str | Variables | Sequence[activation]
    scope: str | None
    order: int
    form: str | Form | Callable[[Tensor], Tensor]
    at: str | At | Callable[[Any, Any], Any]
    estimator: str | Estimator | None
    forward: str
    reduce: str
    metric: Metric | None
    given: Keys | None
    subsample: float | None
    every: int
    seed: int | None
    name: str


class GradientPenalty(Penalty):
    r"""A penalty on the norm of a derivative, to add to a loss.

    .. math:: \lambda(t) \; \frac1G \sum_g \mathrm{form}\Big(\big\|
              D^k_{\mathrm{wrt}} \, \mathrm{mean}_{i \in g} \, \mathrm{of}(z_i) \big\|\Big),
              \quad z_i \text{ taken at } \texttt{at}

    Call it with a tensor that has a graph (no second forward pass is needed), or with a callable,
    which is evaluated at the points that ``at`` chooses. A call does not change ``.grad``, the
    buffers of the modules that it runs (batch norm statistics), the global random state, or the
    ``requires_grad`` of your tensors. A forward pass that the penalty runs has its own dropout
    masks.

    Args:
        of: what is differentiated. "output": the whole output; for several outputs n is the
            Frobenius norm of the Jacobian. "loss": the loss of each sample ``[B]``, or the scalar
            loss of a weight penalty; of steps ``[B, T]``, their sum Σ_t ℓ_it has one norm a sample.
            "sampled_loss": the cross-entropy of logits ``[B, C]`` with labels drawn from their
            softmax. A function of the output, such as ``lambda out: out["logits"]``.
            ``gpkit.activation("encoder.3")``: the output of a submodule.
        wrt: the variables of the derivative: "input", ``gpkit.inputs("a", "b")`` of a dict,
            "weight", ``gpkit.weights("head.*")``, or ``gpkit.activation("encoder.3")``; several
            activations, in a list, or entries have one norm over all.
        scope: the groups. Gradients are averaged within a group, and each group has one norm. For
            inputs: "sample" (default), or "pixel": each pixel of ``[B, C, *S]`` has a norm, over
            its C channels. For weights: "batch" (default), "sample", "accumulated": all
            micro-batches of an optimiser step, in `GradientPenaltyCallback`, or "global": all
            ranks as well, for data parallelism that averages gradients, such as DDP. "pixel",
            "accumulated" and "global" need order 1.
        order: k >= 1, the order of the derivative; 1 is the gradient.
        form: the function of the norm n: "squared" n², "norm" n, ``gpkit.two_sided(c)`` (n - c)²,
            ``gpkit.one_sided(c)`` max(0, n - c)², ``gpkit.absolute(c)`` |n - c|,
            ``gpkit.power(p)`` n^p; each takes ``norm="l1"`` or "linf" instead of "l2". Or any
            function of n ``[G]``, such as ``lambda n: (n - 1).tanh()``.
        at: the points where the derivative is taken: "data", "real", "fake", "interpolate",
            "perturb", an object such as ``gpkit.perturb(0.5)``, ``gpkit.uniform(-1, 1)`` or
            ``gpkit.mixture("real", "fake")``, or a function ``(real, fake) -> points``.
        estimator: how n² is computed: "exact"; "projection" or ``gpkit.projection(n)``;
            "finite_difference" or ``gpkit.finite_difference(step)``; "taylor" or
            ``gpkit.taylor(n)``; or, for the largest singular value, "power_iteration" or
            ``gpkit.power_iteration(n)``. None is "exact", except for order >= 2 in the weights:
            the full derivative is too large there, and None is "projection".
        forward: how the penalty runs a function that it is given. "isolated": it leaves no trace,
            and has dropout masks of its own. "training": as a training forward pass: batch norm
            statistics and the vectors of spectral norm move, and dropout draws from torch's global
            stream, as in a hand-written loop. "eval": in eval mode. Not for a tensor.
        reduce: "mean" over the groups, "sum", or "max": the largest value in the micro-batch.
        metric: A, a function of the variable x -> A: n is the norm of A ∘ D f, such as
            ``metric=torch.abs``. A call with ``metric=`` of its own has that.
        given: what a call must give, "target", "metric" or "sample_weight", each with the key of
            the entry of a batch where Lightning modules find it, or a function of the batch:
            ``given={"target": "forces"}``. See `Penalty.__call__` for their meaning.
        subsample: the part of the samples that the penalty is evaluated on, in (0, 1], such as
            0.25: ⌈B/4⌉ of them, drawn anew at each call. Its mean over all parts is the penalty of
            all samples. For inputs it needs the function, and runs it on these samples only, so the
            function must not hold targets of the others: pass them, ``penalty(f, (x, y))``, or use
            ``of`` an output. For weights with ``scope="sample"`` it takes that part of the losses.
        weight: λ >= 0, or a schedule: a function of the optimiser step.
        every: act on every k-th step, with the weight multiplied by k (lazy regularisation).
        seed: the seed of the penalty's random numbers; None uses torch's initial seed. Each rank
            of a distributed run draws its own numbers.
        name: the name in logs.

    Raises:
        ValueError: if an axis has an invalid value, or two axes do not fit each other.
        TypeError: if an axis has an object of the wrong type.

    >>> import gpkit, torch
    >>> critic = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> penalty = gpkit.GradientPenalty(form=gpkit.two_sided(1.0), weight=10.0)
    >>> penalty(critic, torch.zeros(8, 2)).item()  # 10 (5 - 1)²
    160.0
    """

    compares = True

    def __init__(
        self,
        *,
        of: Of = "output",
        wrt: str | Variables | Sequence[activation] = "input",
        scope: str | None = None,
        order: int = 1,
        form: str | Form | Callable[[Tensor], Tensor] = "squared",
        at: str | At | Callable[[Any, Any], Any] = "data",
        estimator: str | Estimator | None = None,
        forward: str = "isolated",
        reduce: str = "mean",
        metric: Metric | None = None,
        given: Keys | None = None,
        subsample: float | None = None,
        weight: float | Schedule = 1.0,
        every: int = 1,
        seed: int | None = None,
        name: str = "penalty",
    ) -> None:
        if of is not list:  # of all scores
            checks.an_object("of=...", of)
        self.of = (
            of if callable(of) else checks.choice("of=...", of, ("output", "loss", "sampled_loss"))
        )
        self.wrt: Variables = as_wrt("wrt=...", wrt, VARIABLES)
        self.scope = checks.choice("scope=...", scope or self.wrt.scopes[0], self.wrt.scopes)
        self.order = checks.integer("order=...", order, 1)
        self.form = as_form("form=...", form)
        self.at = as_at("at=...", at)
        if estimator is None:
            estimator = projection() if order > 1 and not self.wrt.batched else exact()
        self.estimator: Estimator = checks.piece("estimator=...", estimator, ESTIMATORS, Estimator)
        self.estimator.check(self.order, self.form.norm, self.wrt.batched)
        self.elementary = self.estimator.elementary  # norm layers, at order 1 as well
        self.named = tuple(names(self.of, self.wrt))  # activations
        self.forward = checks.choice("forward=...", forward, FORWARDS)
        scopes.check(self.scope, self.order, self.estimator, self.forward)
        self.metric = as_metric("metric=...", metric)
        self.given = as_keys("given=...", given)
        self.reduce = checks.choice("reduce=...", reduce, formula.REDUCTIONS)
        self.subsample = subsample
        scopes.check_part(self)
        if subsample is not None and self.wrt.batched:
            self.at = part(self.at, subsample)
        super().__init__(weight=weight, every=every, seed=seed, name=name)
        self.shortcuts = Shortcuts()

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
        given: Given | None = None,
    ) -> Terms:
        """Return the terms for a weight: the formula, evaluated from right to left.

        Args:
            f: the first argument of the call; or a `Target` or `Targets`, with graphs.
            args: the other positional arguments.
            real: real samples, if passed by keyword.
            fake: fake samples, if passed by keyword.
            weight: the factor of the reduced value.
            seed: the seed of this evaluation's random numbers.
            scale: the factor of a gradient scaler.
            acts: whether the terms are trained on.
            given: the target, the metric and the weights of the samples.

        Returns:
            The terms.

        Raises:
            FoundError: if torch has no correct derivative through the graph, or if ``acts`` and the
                penalty depends on no trained parameter.
        """
        args = listed(args)
        train = torch.is_grad_enabled()
        short = acts and train and scale is given is None and not (TRACES or RECORDS)
        earlier = self.shortcuts.of(f) if short and self.shortcuts.known else None
        terms = earlier and earlier.terms(self, Arguments(f, args, real, fake, weight, seed))
        if terms is not None:
            return terms
        if given is not None or self.metric is not None or self.given:
            given = completed(given, self)
        named = self.wrt.keys or any(isinstance(x, Mapping) for x in (*args[:1], real, fake))
        if named and self.wrt.batched and not isinstance(f, (Target, Targets)):
            f, (args, real, fake), given = by_name(f, (args, real, fake), given, self)
        with formula.recording(train):
            rng = source(seed, device_of(real, args, fake, f))
            targets, weights = self.targets(f, args, real, fake, rng, seed, acts, given), None
            if given is not None:
                targets = given.on(targets, self)
            if given is not None or targets[0].weights is not None:
                weights = weights_of(given, targets, self)
            for target in () if TRACES else targets:
                target.step = self.evaluated_at
            known = bool(TRACES) or targets[0] in self.seen.by(self)  # as the eager step has
            observe = acts and train
            if not (known or self.estimator.first_order):
                try:
                    for target in targets if targets[0].batched else targets[:1]:
                        require_derivatives(target.y, target.xs, self.order + observe)
                except NormLayerError as error:  # f holds derivatives itself
                    if self.elementary or not callable(f) or self.forward == "training":
                        raise FoundError(error.finding, str(error)) from None
                    self.elementary = True
                    inputs_of = (f, args, real, fake, weight, seed, scale)
                    return self.evaluate(*inputs_of, acts=acts, given=given)
            options: dict[str, Any] = {"observe": observe, "weights": weights}
            n2 = self.shortcuts.squared_norms(self, f, targets) if short else None
            n2 = formula.squared_norms(self, targets, rng, scale, **options) if n2 is None else n2
            terms = formula.terms(self, n2, weight, targets=targets, **options)
        if not TRACES and observe and n2.numel() and not (known and terms.reduced.requires_grad):
            twice = not self.estimator.first_order and scale is None
            warn_of_bias(self.form, self.estimator, targets[0], self.order)
            if known := trains(f, terms, targets, self.order, self.wrt, twice=twice):
                self.seen.add(targets[0])
        if known and observe and not TRACES and getattr(f, "layers", f) is not None:
            terms = self.shortcuts.note(self, f, args, targets, terms)
        return terms if train else terms.detached()

    def targets(
        self,
        f: Any,
        args: tuple[Any, ...],
        real: Any,
        fake: Any,
        rng: Source,
        seed: int,
        acts: bool,
        given: Given | None,
    ) -> list[Target]:
        """Return y and x, at the points that ``at`` chooses."""
        if isinstance(f, (Target, Targets)):
            return [f] if isinstance(f, Target) else f
        call = Call(self, f, args, real, fake, rng, seed, acts=acts, given=given)
        call.require_forward()
        targets = list(self.wrt.targets(call))
        targets[0].made = call.made
        if not all(target.y.requires_grad for target in targets):
            raise RuntimeError(NO_GRAPH)
        return targets

    def with_loss(self, closure: Callable[[], Any], net: Any, *, step: int | None = None) -> Tensor:
        """Return the loss and the weight penalty as one scalar, and count a step.

        The closure runs the training forward pass, which updates batch norm statistics and draws
        random numbers as usual, and the penalty reuses it. With finite differences a step takes
        two forward and backward passes in total. They have run when this returns: the backward
        pass of the result only hands the computed gradient to the parameters, and the graph of the
        closure's loss has been freed.

        >>> import gpkit, torch
        >>> w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
        >>> penalty = gpkit.weight_grad_norm(weight=0.1, estimator="finite_difference")
        >>> penalty.with_loss(lambda: (w**2).sum() / 2, [w]).item()  # 25 / 2 + 0.1·25
        15.0

        Args:
            closure: returns the loss ``[]``, or losses ``[B]``, whose mean is trained on.
            net: the module, or its parameters.
            step: the optimiser step; None counts the calls.

        Returns:
            The scalar loss + penalty.

        Raises:
            TypeError: if this is not a weight penalty, or the closure does not return a tensor.
            RuntimeError: if the penalty depends on no trained parameter, or torch has no correct
                derivative through the net.
        """
        return with_loss([self], closure, net, step).total

    def axes(self) -> dict[str, Any]:
        """Return the choices on the axes by name."""
        return {name: getattr(self, name) for name in AXES}
