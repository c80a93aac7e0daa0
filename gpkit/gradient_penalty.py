"""GradientPenalty: a choice on every axis, evaluated as the formula reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor

from gpkit import checks, formula
from gpkit.autodiff import graph
from gpkit.autodiff.activations import names
from gpkit.autodiff.random import Source, device_of, random_state
from gpkit.axes import scope as scopes
from gpkit.axes.at import At, as_at
from gpkit.axes.call import Call
from gpkit.axes.form import FORMS, Form
from gpkit.axes.of import Of
from gpkit.axes.weight import Schedule
from gpkit.axes.wrt import VARIABLES, Variables
from gpkit.estimators import ESTIMATORS
from gpkit.estimators.base import Estimator, Target
from gpkit.estimators.exact import exact
from gpkit.estimators.projection import projection
from gpkit.estimators.recomputable import Recomputable
from gpkit.estimators.window import summarised
from gpkit.formula import Terms
from gpkit.penalty import Penalty

AXES = ("of", "wrt", "scope", "order", "form", "at", "estimator", "reduce", "weight", "every")
NO_GRAPH = (
    "the penalty has nothing to differentiate: what it was given has no graph. Was it computed "
    "under no_grad, detached, or made by a gradient without create_graph=True?"
)


class Axes(TypedDict, total=False):
    """Keyword arguments of `GradientPenalty` except ``weight``, for presets that forward them."""

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


class GradientPenalty(Penalty):
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
            estimator = projection() if order > 1 and not self.wrt.batched else exact()
        self.estimator: Estimator = checks.piece("estimator=...", estimator, ESTIMATORS, Estimator)
        self.estimator.check(self.order, self.form.norm, self.wrt.batched)
        scopes.check(self.scope, self.order, self.estimator)
        self.named = tuple(names(self.of, self.wrt))  # activations, on either axis
        self.reduce = checks.choice("reduce=...", reduce, formula.REDUCTIONS)
        super().__init__(weight=weight, every=every, seed=seed, name=name)

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
        """Return the terms for a weight: the formula, from right to left.

        Args:
            f: the first argument of the call; or a `Target` that is ready to be differentiated.
            args: the other positional arguments.
            real: real samples, if given by keyword.
            fake: fake samples, if given by keyword.
            weight: the factor of the reduced value.
            seed: of the random numbers.
            scale: of a gradient scaler.
            acts: whether the terms are trained on.

        Returns:
            The terms.

        Raises:
            RuntimeError: if there is no graph to differentiate, or one that torch cannot.
        """
        train = torch.is_grad_enabled()
        with _graphs(train):
            rng = torch.Generator(device_of(f, args, real, fake)).manual_seed(seed)
            targets = self._targets(f, args, real, fake, rng, seed)
            self._require_derivatives(targets[0], trains=acts and train)
            n2 = formula.squared_norms(self, targets, rng, scale)
            terms = formula.terms(self, n2, weight, observe=acts)
        if acts and train and not (self.effect_confirmed and terms.reduced.requires_grad):
            unused = f"{type(self.wrt).__name__}: {self.wrt.missing}"
            self.effect_confirmed |= formula.trains(terms, targets, self.order, unused)
        return terms if train else terms.detached()

    def _targets(
        self, f: Any, args: tuple[Any, ...], real: Any, fake: Any, rng: Source, seed: int
    ) -> list[Target]:
        """Return y and x, at the points that ``at`` says."""
        if isinstance(f, Target):
            return [f]
        args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)  # net.parameters()
        targets = list(self.wrt.targets(Call(self, f, args, real, fake, rng, seed)))
        if not all(target.y.requires_grad for target in targets):
            raise RuntimeError(NO_GRAPH)
        return targets

    def _require_derivatives(self, target: Target, *, trains: bool) -> None:
        """Refuse a graph without a right derivative of order k, or k + 1 where it is trained."""
        if not (self.effect_confirmed or self.estimator.first_order):
            graph.require_derivatives(target.y, target.xs, self.order + trains)

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
        return with_loss([self], closure, net, step)

    def axes(self) -> dict[str, Any]:
        """Return the choices on the axes by name."""
        return {name: getattr(self, name) for name in AXES}


def with_loss(
    penalties: Sequence[Penalty], closure: Callable[[], Any], net: Any, step: int | None
) -> Tensor:
    """Return the loss and penalties in the weights as one scalar, from one training forward.

    Args:
        penalties: in the weights.
        closure: gives the loss.
        net: the module, or its parameters.
        step: the optimiser step; None counts the calls.

    Returns:
        A scalar.

    Raises:
        TypeError: if a penalty is not in the weights, or the closure is no function.
    """
    in_weights = [p for p in penalties if isinstance(p, GradientPenalty) and not p.wrt.batched]
    if len(in_weights) < len(penalties):
        raise TypeError(
            "`with_loss(closure, net)` takes a penalty in the weights; add one in the inputs to "
            "the loss: loss + penalty(f, x)"
        )
    if not callable(closure):
        raise TypeError(
            f"`with_loss(closure, net)` takes a function that gives the loss; got a "
            f"{type(closure).__name__}"
        )
    net = list(net) if isinstance(net, Iterator) else net
    first = in_weights[0]
    if not torch.is_grad_enabled():
        total = _loss(first, closure()).mean()
        for penalty in in_weights:
            total = total + penalty(closure, net, step=step)
        return total
    state = random_state(device_of(net))
    given: Any = closure()
    y = _loss(first, given)
    if len(in_weights) == 1 and not first.estimator.reuses_graph:
        y = summarised(y) if y.numel() == 1 and y.requires_grad else y
        given = y
    total = y.mean()
    for penalty in in_weights:
        f = given if penalty.estimator.reuses_graph else Recomputable(given, closure, state)
        terms = penalty.act(f, net, step=step)
        total = total if terms is None else terms.added_to(total)
    return total


def _loss(penalty: GradientPenalty, given: Any) -> Tensor:
    """Return the loss or losses, of what the closure gave."""
    y = penalty.of(given) if callable(penalty.of) else given
    if not isinstance(y, Tensor):
        raise TypeError(f"the closure gave a {type(y).__name__}, and a loss was expected")
    return y


def _graphs(train: bool) -> AbstractContextManager[Any]:
    """Return a context in which graphs are made, whatever mode is on."""
    if train and not torch.is_inference_mode_enabled():
        return nullcontext()
    modes = ExitStack()
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.enable_grad())
    return modes
