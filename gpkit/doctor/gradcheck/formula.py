"""The formula that a penalty should have: another penalty, at the same points."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import tree_map_only
from gpkit.axes.at import data
from gpkit.doctor.gradcheck.compared import DEVIATIONS, Known, known
from gpkit.doctor.gradcheck.report import Check, failed, unchecked
from gpkit.doctor.gradcheck.trial import Call, Trial
from gpkit.estimators.exact import exact
from gpkit.estimators.projection import projection
from gpkit.estimators.trace import trace
from gpkit.gradient_penalty import GradientPenalty

DRAWS = 200
GIVEN = ("target", "metric", "sample_weight", "groups")


def formula(found: Known, like: Any) -> Check:
    """Value and gradient are those of another penalty, at the points that this one has chosen.

    A random estimate is compared on average.

    Returns:
        The check.
    """
    if like is None:
        return unchecked("say what it should be: like=gpkit.wgan_gp(weight=10), or a function")
    of_like = partial(_of_penalty, found, like) if isinstance(like, GradientPenalty) else like
    if isinstance(like, GradientPenalty) and like.at.moves and found.points is None:
        return unchecked("the points at which the net is differentiated cannot be seen")
    other = found.trial.like(fn=of_like)
    theirs = known(other)
    points = _for(theirs, found.points)
    one, two = _parts(found.trial, 0), _parts(other, 0)
    if _close(found, one, two):
        return _equal(one, two)
    if points is not None:
        two = _parts(other, 0, points)
        if _close(found, one, two):
            return _equal(one, two)
    drawn = theirs.estimated or (theirs.drawn and points is None)
    if found.estimated or drawn:
        return _on_average(found, other if drawn else None, points, two)
    return _differ(found, one, two)


def _of_penalty(
    found: Known, like: GradientPenalty, net: nn.Module, *samples: Any, **named: Any
) -> Tensor:
    """Return the value of a gpkit penalty, at the points of the run if its own are random."""
    penalty = copy.deepcopy(like)
    penalty.every = 1
    for kind, instead in ((projection, exact()), (trace, trace())):
        if isinstance(penalty.estimator, kind):
            penalty.estimator = instead
    given = {name: value for name, value in named.items() if name in GIVEN}
    call = _together(found.run.calls)
    if call is not None and penalty.at.moves:
        penalty.at = data()
        z = call.tensors[call.variables[0]]
        return penalty.terms(_with_others(net, call), z, **given).penalty
    of = net if call is None else _with_others(net, call)
    kinds = dict(zip(("real", "fake"), samples, strict=False))
    kinds = {kind: kinds.get(kind, samples[0]) for kind in like.at.reads}
    if isinstance(like.at, data):
        return penalty.terms(of, samples[0], **given).penalty
    return penalty.terms(of, **kinds, **given).penalty


def _together(calls: list[Call]) -> Call | None:
    """Return one call of the net for all points that it was differentiated at, each once."""
    distinct: list[Call] = []
    for call in calls:
        points = [call.tensors[i] for i in call.variables]
        if points and not any(
            len(c.variables) == len(points)
            and all(torch.equal(c.tensors[i], p) for i, p in zip(c.variables, points, strict=True))
            for c in distinct
        ):
            distinct.append(call)
    if len(distinct) < 2:
        return distinct[0] if distinct else None
    first, sizes = distinct[0], [len(c.tensors[c.variables[0]]) for c in distinct]
    each = [iter(c.tensors) for c in distinct]

    def joined(x: Tensor) -> Tensor:
        parts = [next(tensors) for tensors in each]
        rows = [len(p) if p.ndim else 0 for p in parts]
        return torch.cat(parts) if rows == sizes else x

    args, kwargs = tree_map_only(Tensor, joined, (first.args, first.kwargs))
    return Call(args, kwargs, first.variables)


def _with_others(net: nn.Module, call: Call) -> Callable[..., Any]:
    """Return the net as a function of its differentiated input, with the others of a call."""
    point = call.tensors[call.variables[0]]
    if len(call.tensors) == 1 and len(call.args) == 1 and not call.kwargs:
        return net

    def of(x: Tensor) -> Any:
        args, kwargs = tree_map_only(
            Tensor, lambda t: x if t is point else t, (call.args, call.kwargs)
        )
        return net(*args, **kwargs)

    return of


def _for(theirs: Known, points: list[Call] | None) -> list[Call] | None:
    """Return the points for the runs of the other penalty, if it has as many of them."""
    if points is None or theirs.points is None or not theirs.drawn:
        return None
    same = [c.tensors[c.variables[0]].shape for c in theirs.points]
    return points if {p.tensors[p.variables[0]].shape for p in points} == set(same) else None


def _parts(trial: Trial, seed: int, at: list[Call] | None = None) -> tuple[float, Tensor]:
    """Return the value, and the gradient as one vector."""
    run = trial.run(seed, gradient=True, at=at)
    return run.value, torch.cat([g.double().flatten() for g in run.gradient.values()])


def _close(found: Known, one: tuple[float, Tensor], two: tuple[float, Tensor]) -> bool:
    slack = 10 * found.tolerance
    values = found.close(one[0], two[0], 10)
    return values and float((one[1] - two[1]).norm()) <= slack * float(two[1].norm()) + 1e-30


def _equal(one: tuple[float, Tensor], two: tuple[float, Tensor]) -> Check:
    return Check(f"value and gradient are those of like=: {one[0]:.6g} and {two[0]:.6g}")


def _differ(found: Known, one: tuple[float, Tensor], two: tuple[float, Tensor]) -> Check:
    value = one[0] / two[0] if two[0] else float("inf")
    scale = float(two[1].square().sum())
    slope = float(one[1] @ two[1]) / scale if scale else float("inf")
    off = float((one[1] - two[1]).norm() / two[1].norm()) if scale else float("inf")
    said = f"the value is {one[0]:.6g}, that of like= {two[0]:.6g}; the gradient is {off:.1%} off"
    if found.close(value, slope, 100) and float((one[1] - slope * two[1]).norm()) < 1e-4 * off:
        cause = (
            f"it is {value:.6g} times like=: a factor of the weight, of ½, of the number of "
            "samples or entries"
        )
    elif found.close(one[0], two[0], 10):
        cause = "the value is right and its gradient is not: see the check of the gradient"
    else:
        cause = "is it another form, norm or point than that of like=? See the other checks"
    return failed(said, cause)


def _on_average(
    found: Known, other: Trial | None, points: list[Call] | None, exactly: tuple[float, Tensor]
) -> Check:
    """Compare means, of the value and of the gradient along the other one's."""
    direction = exactly[1] / exactly[1].norm().clamp(min=1e-30)

    def mean(trial: Trial | None, at: list[Call] | None, first: int) -> tuple[Tensor, Tensor]:
        runs = [_parts(trial, first + k, at) for k in range(DRAWS)] if trial else [exactly]
        drawn = torch.tensor([[v, float(g @ direction)] for v, g in runs], dtype=torch.float64)
        return drawn.mean(0), drawn.var(0, correction=len(runs) > 1) / len(runs)

    (a, a_error), (b, b_error) = mean(found.trial, found.points, 0), mean(other, points, DRAWS)
    slack = DEVIATIONS * (a_error + b_error).sqrt() + 1e-6 * b.abs()
    said = f"on average over {DRAWS} draws {a[0]:.4g} ± {a_error[0].sqrt():.1g}, like= {b[0]:.4g}"
    if bool(((a - b).abs() <= slack).all()):
        return Check(said)
    return failed(
        f"{said}; along the gradient {a[1]:.4g}, like= {b[1]:.4g}",
        "is the mean of its square what like= is? Directions need E[v vᵀ] = I, drawn for each "
        "sample",
    )
