"""What a call gives besides the samples: a target, a metric, and weights of the samples."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from gpkit import checks
from gpkit.axes.average import running_average
from gpkit.axes.form import Form
from gpkit.axes.given.entries import rows_of
from gpkit.axes.given.keys import NAMES
from gpkit.axes.given.sample_weight import kept, sample_weights, weighs_steps
from gpkit.estimators.base import Estimator, Target
from gpkit.estimators.compared import Compared
from gpkit.estimators.window import POOLED


class Axes(Protocol):
    """The axes of a `GradientPenalty` that say whether a comparison is possible."""

    wrt: Any
    scope: str
    order: int
    form: Form
    estimator: Estimator
    reduce: str


@dataclass(frozen=True, eq=False)
class Given:
    r"""What a call gives besides the samples.

    .. math:: n_i = \|A_i \circ (D f(x_i) - g_i)\|, \qquad \sum_i w_i v_i \, / \sum_i w_i

    Args:
        target: g, subtracted from the derivative: a tensor, or one for each variable.
        metric: A, a factor of each entry: a tensor, one for each variable, or a function x -> A.
        sample_weight: w, the weights of the samples.
        groups: the group ``[N]`` of each row, if several rows of the inputs have one norm.
    """

    target: Any = None
    metric: Any = None
    sample_weight: Any = None
    groups: Any = None

    def on(self, targets: Sequence[Target], axes: Axes) -> list[Target]:
        """Return the targets of an evaluation, with what their derivatives are compared with.

        Args:
            targets: the outputs to differentiate.
            axes: of the penalty.

        Returns:
            The same targets, compared.

        Raises:
            ValueError: if the estimator cannot compare, or a shape does not fit.
            TypeError: if a target or metric is no tensor.
        """
        if self.target is None and self.metric is None:
            return list(targets)
        if not axes.estimator.compares:
            raise ValueError(
                f"`estimator={type(axes.estimator).__name__}()` takes no target= and no metric=, "
                "because it does not compute the entries of a gradient: use estimator='exact'"
            )
        return [
            replace(
                target,
                compared=Compared(
                    rows_of("target", self.target, target, axes.order),
                    rows_of("metric", self.metric, target, axes.order),
                ),
            )
            for target in targets
        ]

    def metrics_at(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return the metric for inputs ``xs`` as ``[G, R, n]`` each, before there is an output."""
        given = self.metric
        if given is None:
            return None
        part = given[0] if isinstance(given, (list, tuple)) and given else given
        several = isinstance(part, Tensor) and part.ndim > xs[0].ndim
        y = xs[0].detach().new_empty(len(xs[0]), part.shape[1] if several else 1)
        return rows_of("metric", given, Target(y, xs, True), 1)


def weights_of(given: Given | None, targets: Sequence[Target], axes: Axes) -> Tensor | None:
    """Return w ``[G]``, one weight for each norm; None if all weigh the same.

    Args:
        given: by the call; its weights multiply those of the points.
        targets: the outputs to differentiate.
        axes: of the penalty.

    Returns:
        The weights.

    Raises:
        ValueError: if there is not one weight for each sample, or a weighted mean of the values has
            no meaning.
    """
    first = targets[0]
    samples = None if given is None else given.sample_weight
    if axes.scope == "batch":  # there they weigh the losses
        samples = None
    if samples is None and first.weights is None:
        return None
    if axes.scope in POOLED:
        raise ValueError(
            f"scope={axes.scope!r} has one norm, of a mean gradient, so it takes no "
            "sample_weight=: weigh the samples in the loss, or use scope='batch' with losses [B]"
        )
    if axes.reduce == "max":
        raise ValueError(
            "sample_weight= takes reduce='mean' or 'sum'; got 'max', which has no weights"
        )
    if isinstance(getattr(axes.form, "center", None), running_average):
        raise ValueError(
            "sample_weight= does not weigh the running average in the form: use a number as its "
            "centre"
        )
    if samples is not None and weighs_steps(samples, first.steps) and not first.pixels:
        samples = kept(samples)  # they are in the loss of a sample, where it has a step
    if not first.batched:
        count = len(first.y) if first.layers is not None else len(targets)
        return sample_weights(samples, count)
    batch = len(first.xs[0] if first.groups is None else first.y)
    pixels = math.prod(first.xs[0].shape[2:]) if first.pixels else 1
    parts = [sample_weights(w, batch, pixels) for w in (samples, first.weights) if w is not None]
    return parts[0] if len(parts) == 1 else parts[0] * parts[1].to(parts[0].device)


IS_GIVEN = partial(operator.is_not, None)  # of what a call gives beside samples


def as_given(given: Mapping[str, Any], penalty: Any) -> dict[str, Given]:
    """Return the argument ``given`` of a penalty's `evaluate`; {} if nothing is given.

    Args:
        given: the arguments of a call by name.
        penalty: that is called.

    Returns:
        The argument by name.

    Raises:
        TypeError: if there is no such argument, or the penalty does not take it.
    """
    found = {name: value for name, value in given.items() if value is not None}
    for name in found:
        if name not in NAMES:
            raise TypeError(f"a penalty takes no {name}={checks.nearest(name, NAMES)}")
        if not penalty.compares:
            raise TypeError(f"{penalty.name} takes no {name}=: it compares no derivative")
    return {"given": Given(**found)} if found else {}


def completed(given: Given | None, penalty: Any) -> Given | None:
    """Return what a call gives, with the metric of the penalty.

    Args:
        given: by the call.
        penalty: with the axes ``metric`` and ``given``.

    Returns:
        The same, or None if there is nothing.

    Raises:
        TypeError: if the call lacks what the penalty needs.
        ValueError: if it has something for each sample, and the penalty draws the samples.
    """
    own = [n for n in ("target", "metric", "sample_weight") if getattr(given, n, None) is not None]
    if penalty.subsample is not None and own:
        raise ValueError(
            f"subsample={penalty.subsample} draws the samples itself, so the call cannot have "
            f"{own[0]}= for each: leave subsample= out, or draw the samples before the call"
        )
    for name in penalty.given:
        if getattr(given, name, None) is None:
            raise TypeError(
                f"{penalty.name} needs {name}=..., as in penalty(f, x, {name}=...); in a Lightning "
                f"module it is the entry {penalty.given[name]!r} of the batch, by "
                f"given={{{name!r}: ...}}"
            )
    if penalty.metric is None or (given is not None and given.metric is not None):
        return given
    return replace(given or Given(), metric=penalty.metric)
