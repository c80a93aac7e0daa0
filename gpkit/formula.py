r"""The formula: from derivatives to squared norms, from these to values, and to one number.

.. math:: \lambda \; \frac1G \sum_g \mathrm{form}(n_g), \quad n_g = \|D^k y_g\|

Direct calls, compiled losses and sharded weights all evaluate it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import MENDED, mended
from gpkit.autodiff.distributed import require_dynamic_graph
from gpkit.autodiff.known_gradient import Difference, Number, known_gradient, node_of
from gpkit.autodiff.numerics import root
from gpkit.autodiff.random import Source, has_ranks
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.axes.form import Form, norm, squared
from gpkit.axes.given.sample_weight import weighted_mean, weighted_sum
from gpkit.estimators.base import Estimator, Target

# amax splits its gradient among tied groups. The mean over ranks is taken by DDP.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": Tensor.mean,
    "sum": Tensor.sum,
    "max": Tensor.amax,
}


class Axes(Protocol):
    """The axes of a `GradientPenalty` that the formula uses."""

    order: int
    form: Form
    estimator: Estimator
    reduce: str


@dataclass(eq=False)
class Terms:
    """The parts of a penalty, for G groups: G samples, or one batch.

    Args:
        squared_norms: n² ``[G]``, where n is the norm of each group's derivative.
        values: form(n) ``[G]``, before the reduction and the weight.
        weight: the factor of ``reduced`` at this step.
        reduced: the mean of the values, a scalar; or their sum or maximum, by ``reduce``.
        outputs: what was differentiated, in a distributed run.
        sample_weight: the weights of the norms ``[G]``; None if all weigh the same.
        ready: a loss, and a function that lets the sum of it and the penalty have a cheaper
            backward pass; None if there is none.
    """

    squared_norms: Tensor
    values: Tensor
    weight: float
    reduced: Tensor
    outputs: Sequence[Tensor] = ()
    sample_weight: Tensor | None = None
    ready: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None

    @property
    def norms(self) -> Tensor:
        """Return n, ``[G]``."""
        return root(self.squared_norms)

    @property
    def mean_norm(self) -> Tensor:
        """Return the mean of the norms, a scalar, without a graph."""
        norms = self.norms.detach()
        weights = self.sample_weight
        if weights is None:
            return norms.mean()
        return weighted_mean(norms, weights.detach().repeat(len(norms) // len(weights)))

    @property
    def penalty(self) -> Tensor:
        """Return the scalar to add to the loss, ``weight * reduced``."""
        return self.weight * self.reduced

    def added_to(self, loss: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return ``loss + penalty``, in one operation; with one gradient if both are known.

        Args:
            loss: the loss.
            overwrite: whether a known gradient of the loss may be overwritten.
        """
        if TRACES:  # the weight is a tensor
            return loss + self.penalty
        total = torch.add(loss, self.reduced, alpha=self.weight)
        if self.ready is not None and self.ready[0] is loss:
            return self.ready[1](total)
        own = self.squared_norms.grad_fn
        difference: Difference | None = getattr(own, "difference", None)
        _, grads = getattr(node_of(loss), "known", ((), ()))
        if difference is None or not difference.starts_at(grads):
            return total
        alone = self.sample_weight is None and self.values.numel() == 1
        if alone and self.values is self.squared_norms:
            share = torch.full_like(self.reduced, self.weight)
        elif graph.passes(self.reduced, own):
            share = torch.autograd.grad(self.penalty, self.squared_norms)[0].sum()
        else:  # the form has a graph of its own
            return total
        grads = difference.added_to(grads, share, overwrite=overwrite)
        return known_gradient(total.detach(), difference.leaves, grads, owned=overwrite)

    def detached(self) -> Terms:
        """Return the same terms without graphs."""
        parts = (self.squared_norms, self.values, self.reduced)
        n2, values, reduced = (t.detach() for t in parts)
        return Terms(n2, values, self.weight, reduced, (), self.sample_weight)


def squared_norms(
    axes: Axes,
    targets: Sequence[Target],
    rng: Source,
    scale: Tensor | float | None = None,
    *,
    observe: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Return n² ``[G]``: the squared norm of each group's derivative.

    Args:
        axes: supply the order, the estimator, and the norm of the form.
        targets: the outputs to differentiate, with their variables.
        rng: the random numbers of the estimator.
        scale: the factor of a gradient scaler: ``scale·y`` is differentiated, and n² is divided by
            ``scale²``.
        observe: as in `terms`.
        weights: as in `terms`.

    Returns:
        n² ``[G]``, differentiable.
    """
    if has_ranks() and not TRACES:
        require_dynamic_graph(targets[0].y)
    if scale is not None:
        targets = [target.scaled(scale) for target in targets]
    if targets[0].mean and axes.estimator.first_order:
        share = partial(_share, axes, observe, weights)
        targets = [replace(target, share=share) for target in targets]
    of = partial(axes.estimator.squared_norms, order=axes.order, norm=axes.form.norm, rng=rng)
    if axes.estimator.first_order:
        parts = [of(target) for target in targets]
    else:
        # the targets of several samples are parts of one graph
        graphs = targets if targets[0].batched else targets[:1]
        mends = not is_compiling() and any(MENDED.keys() & t.fingerprint.kinds for t in graphs)
        with mended(*[t.y for t in graphs]) if mends else nullcontext():
            parts = [of(target) for target in targets]
    n2 = torch.cat(parts) if len(parts) > 1 else parts[0]
    return n2 if scale is None else n2 / scale / scale


def terms(
    axes: Axes,
    n2: Tensor,
    weight: float,
    *,
    observe: bool = False,
    targets: Sequence[Target] = (),
    weights: Tensor | None = None,
) -> Terms:
    """Return the terms for given squared norms.

    Args:
        axes: supply the form and the reduction.
        n2: n², ``[G]``.
        weight: the factor of the reduced value.
        observe: whether to update the state of the form, such as a running average.
        targets: the outputs that were differentiated.
        weights: the weights of the values ``[G]``; None if all weigh the same.

    Returns:
        The terms.
    """
    form = axes.form
    if observe:
        form = form.for_call(n2)
        axes.form.observe(n2)
    values = form(n2)
    outputs = [target.y for target in targets] if has_ranks() else ()
    scores = targets[0].scores if targets else 1
    if scores == 1:
        total = reduced(values, axes.reduce, weights)
    else:  # each score has a penalty
        parts = values.chunk(scores)
        total = sum_of([reduced(part, axes.reduce, weights) for part in parts])
    return Terms(n2, values, weight, total, outputs, weights)


def reduced(values: Tensor, how: str = "mean", weights: Tensor | None = None) -> Tensor:
    """Return the mean of the values ``[G]``, their sum or their maximum: a scalar."""
    if values.shape[0] == 0:  # an empty batch costs nothing
        return values.sum()
    if weights is not None:
        return weighted_mean(values, weights) if how == "mean" else weighted_sum(values, weights)
    return values.reshape(()) if values.shape[0] == 1 else REDUCTIONS[how](values)


def of_one_norm(
    penalty: Any, n: Number, weight: float, like: Tensor
) -> tuple[Number, Callable[[], tuple[Number, Callable[[], Terms]]]]:
    """Return the derivative of a penalty in n², for one norm n, and how its value is noted.

    Args:
        penalty: the penalty.
        n: the norm, without a graph.
        weight: λ.
        like: a tensor of the dtype and device of the loss.

    Returns:
        λ times the derivative; and a function that lets the penalty see n, when it is known that
        the step succeeds, and returns the reduced value, and what makes the terms.
    """
    form = penalty.form
    if isinstance(n, float) and not callable(penalty.weight):

        def alone() -> Terms:
            return terms(penalty, torch.as_tensor([n * n], dtype=like.dtype), weight)

        if type(form) is squared:
            return weight * form.scale, lambda: (form.scale * n * n, alone)
        if type(form) is norm and form.eps == 0:
            share = weight * form.scale / (2 * n) if n else 0.0
            return share, lambda: (form.scale * n, alone)
    n2 = torch.as_tensor(n, dtype=like.dtype).square().reshape(1).requires_grad_()
    called = form.for_call(n2)
    values = called(n2)
    whole = reduced(values, penalty.reduce)
    own = any(leaf is not n2 for leaf in graph.leaves(whole))  # a graph of its own
    (slope,) = torch.autograd.grad(whole * weight, n2, retain_graph=True)

    def noted() -> tuple[Number, Callable[[], Terms]]:
        form.observe(n2)
        found = penalty.observed(Terms(n2, values, weight, whole))
        value = reduced(called(n2.detach()), penalty.reduce) if own else whole.detach()
        return value, found.detached

    return slope.sum(), noted


def recording(train: bool) -> AbstractContextManager[Any]:
    """Return a context in which autograd records graphs, also under no_grad or inference mode."""
    if TRACES or (train and not torch.is_inference_mode_enabled()):
        return nullcontext()
    modes = ExitStack()
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.enable_grad())
    return modes


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of scalars."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum()


def _share(axes: Axes, observe: bool, weights: Tensor | None, n2: Tensor) -> Tensor:
    """Return the derivative of the reduced value with respect to n², ``[G]``, without a graph."""
    n2 = n2.detach().requires_grad_()
    form = axes.form.for_call(n2) if observe else axes.form
    return torch.autograd.grad(reduced(form(n2), axes.reduce, weights), n2)[0]
