"""The critic's scores of real and fake samples, and penalties on their graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.isolation import double_backward, isolated
from gpkit.autodiff.numerics import wide
from gpkit.autodiff.reached import reach
from gpkit.autodiff.state import Start, start_of
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.autodiff.tracing.points import variable
from gpkit.estimators.base import Target, Targets
from gpkit.estimators.repeats import SAME, require_same
from gpkit.lightning.gan.losses import Scored
from gpkit.lightning.gan.samples import Samples, conditioned, first
from gpkit.needs import Needs, needs_of
from gpkit.penalty import Penalty


@dataclass(frozen=True)
class Scores:
    """Real and fake samples, and the critic's scores of them. With packs, a sample is a pack.

    Args:
        real: real samples x, ``[B, *S]``, or a dict of them.
        fake: fake samples y, likewise; None if nothing looks at them.
        labels: of the samples, or None.
        of_real: D(x), ``[B, ...]``, or a list of such; None if penalties must run the critic.
        of_fake: D(y), likewise.
        starts: what the critic's passes on real and fake samples started from, if a penalty
            repeats them at other points.
        batch: as it came from the DataLoader, for what penalties need of it.
    """

    real: Samples
    fake: Samples | None
    labels: Any
    of_real: Scored | None = None
    of_fake: Scored | None = None
    starts: Mapping[str, Start] = field(default_factory=dict)
    batch: Any = None

    def both(self) -> tuple[Scored, Scored]:
        """Return D(x) and D(y), which must be there."""
        assert self.of_real is not None
        assert self.of_fake is not None
        return self.of_real, self.of_fake

    def without_scores(self) -> Scores:
        """Return the samples alone."""
        return Scores(self.real, self.fake, self.labels, batch=self.batch)


def score(critic: nn.Module, x: Samples, labels: Any) -> Scored:
    """Return the critic's scores of samples.

    Args:
        critic: ``critic(x)``, or with labels ``critic(x, labels)``.
        x: ``[B, *S]``, or a dict of them.
        labels: of the samples, or None.

    Returns:
        The scores, ``[B, ...]``, in float32 or better: a loss takes means and differences of them.
        A list of them if the critic returns a list, as a multi-scale critic does.

    Raises:
        ValueError: if the critic does not return at least one score per sample.
    """
    scores, batch = conditioned(critic, labels, x)(x), len(first(x))
    several = isinstance(scores, (list, tuple))
    parts = list(scores) if several else [scores]
    for part in parts or [None]:
        if not isinstance(part, Tensor) or part.ndim == 0 or len(part) != batch:
            got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"the critic must return scores of each of {batch} samples, [{batch}], "
                f"[{batch}, 1] or [{batch}, ...], or a list of such scores, one for each scale; "
                f"got {'a list with ' if several else ''}{got}: change the critic"
            )
    parts = [part.to(wide(part)) for part in parts]
    return parts if several else parts[0]


def joined(scores: Any) -> Any:
    """Return one score per sample ``[B]`` of a list: the sum over scales of the mean score.

    Anything but a list or tuple is returned unchanged.
    """
    if not isinstance(scores, (list, tuple)):
        return scores
    return sum(part.reshape(len(part), -1).mean(1) for part in scores)


def differentiated(
    critic: nn.Module, labels: Any, penalty: Penalty, samples: Samples
) -> Callable[[Any], Any]:
    """Return the critic as a penalty differentiates it: a list of scores is `joined`.

    A penalty with a function as ``of`` is given the list itself.

    Raises:
        ValueError: if there are labels, and the penalty draws some of the samples.
    """
    if labels is not None and needs_of(penalty).takes_part:
        raise ValueError(
            f"{penalty.name} has subsample=, and the labels of this batch are of all its samples: "
            "leave subsample= out, or use every=..."
        )
    f = conditioned(critic, labels, samples)
    return f if callable(penalty.axes()["of"]) else lambda x: joined(f(x))


def scores_of(critic: nn.Module, samples: Scores, reusing: Iterable[Penalty]) -> Scores:
    """Return the scores of a batch, with a graph that some penalties will differentiate.

    Args:
        critic: D.
        samples: real and fake samples, and their labels.
        reusing: the penalties that reuse the graph, see `Needs.samples`. The samples that they
            need require grad in the result, and the critic runs on kernels that they can
            differentiate.

    Returns:
        The same with the scores.
    """
    reusing = list(reusing)
    needs = [needs_of(penalty) for penalty in reusing]
    # The first time a look at the gradient says whether samples are independent of each other.
    seen = [
        n.values and (TRACES or p.effect_confirmed) for n, p in zip(needs, reusing, strict=True)
    ]
    differentiated = [own for own, known in zip(needs, seen, strict=True) if not known]
    labels = samples.labels
    assert samples.fake is not None
    points: dict[str, Samples] = {"real": samples.real, "fake": samples.fake}
    starts = {}
    order = max([0, *[own.order for own in needs]])
    scored = {}
    for kind, x in points.items():
        own_needs = [own for own in differentiated if kind in own.samples]
        if own_needs:
            points[kind] = x = variables(x, own_needs)  # not the batch's own tensors
        if any(kind in own.samples and own.continues for own in needs):
            starts[kind] = start_of(critic, first(x).device)
        with double_backward(order) if order else nullcontext():
            scored[kind] = score(critic, x, labels)
    real, fake = points["real"], points["fake"]
    return Scores(real, fake, labels, scored["real"], scored["fake"], starts, samples.batch)


def variables(x: Samples, needs: Iterable[Needs]) -> Samples:
    """Return samples as new variables; of a dict the entries that penalties are in."""
    if not isinstance(x, Mapping):
        return variable(x)
    names = [own.names or tuple(x) for own in needs]
    for name in dict.fromkeys(name for own in names for name in own):
        require_entry(x, name)
    return {key: variable(v) if any(key in own for own in names) else v for key, v in x.items()}


def require_entry(x: Mapping[str, Tensor], name: str) -> None:
    """Refuse a name that samples do not have, or that has no gradient.

    Raises:
        TypeError: in these cases.
    """
    if name not in x:
        raise TypeError(
            f"`wrt=gpkit.inputs(...)` names {name!r}, and the samples have "
            f"{list(x)}{checks.nearest(name, x)}"
        )
    if not x[name].is_floating_point():
        raise TypeError(
            f"a penalty in the samples needs floating-point entries; got {name!r}, {x[name].dtype}:"
            " name the others, wrt=gpkit.inputs(...)"
        )


def entries_of(x: Samples, penalty: Any) -> tuple[Tensor, ...]:
    """Return the variables of a penalty in samples: these themselves, or entries of a dict."""
    if not isinstance(x, Mapping):
        return (x,)
    return tuple(x[name] for name in penalty.wrt.keys or x)


def with_entries(x: Samples, penalty: Any, points: tuple[Tensor, ...]) -> Samples:
    """Return samples with other variables of a penalty."""
    if not isinstance(x, Mapping):
        return points[0]
    return {**x, **dict(zip(penalty.wrt.keys or x, points, strict=True))}


def targets_on(critic: nn.Module, scores: Scores, penalty: Any, needs: Needs) -> Targets:
    """Return what a penalty differentiates, on the graphs of the scores that the losses use.

    Args:
        critic: D, for a penalty that evaluates it at other points too.
        scores: of samples that require grad.
        penalty: a `GradientPenalty`.
        needs: of the penalty; they name the kinds of samples, "real" or "fake", in their order.

    Returns:
        One target for each kind.

    Raises:
        RuntimeError: if the critic does not repeat its scores.
    """
    found: list[Target] = []
    for kind in needs.samples:
        x: Any = scores.real if kind == "real" else scores.fake
        xs = entries_of(x, penalty)
        y = scores.of_real if kind == "real" else scores.of_fake
        y = penalty.of(y) if callable(penalty.of) else joined(y)
        again = None
        if needs.continues:
            again = partial(rescored, critic, scores, penalty, kind)
            known = reach(critic).known.facts
            if SAME not in known:
                repeated = again(*xs)  # in the critic's own dtype; the scores are in a wide one
                require_same(penalty.wrt.columns(y, len(xs[0])).to(repeated.dtype), repeated)
                known.add(SAME)
        found += penalty.wrt.targets_of(y, xs, penalty, again)
    return Targets(found)


def rescored(critic: nn.Module, scores: Scores, penalty: Any, kind: str, *xs: Tensor) -> Tensor:
    """Return what a penalty differentiates ``[B, m]`` at other points, in a pass as the first."""
    samples: Any = scores.real if kind == "real" else scores.fake
    f = differentiated(critic, scores.labels, penalty, samples)
    estimator, start, x = penalty.estimator, scores.starts[kind], xs[0]
    with isolated(critic, start, x.device, penalty.order, twice=not estimator.first_order):
        y = f(with_entries(samples, penalty, xs))
    y = penalty.of(y) if callable(penalty.of) else y
    columns: Tensor = penalty.wrt.columns(y, len(x))
    return columns
