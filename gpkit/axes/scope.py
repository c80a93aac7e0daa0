"""The axis `scope`: the groups whose gradients are averaged before the norm is taken."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpkit import checks
from gpkit.autodiff.tracing.calls import holds
from gpkit.estimators.base import Estimator
from gpkit.estimators.window import POOLED


def check(scope: str, order: int, estimator: Estimator, forward: str = "isolated") -> None:
    """Refuse an order, an estimator or a way to run the net that does not work with a scope.

    Raises:
        ValueError: if the derivative cannot be averaged over micro-batches before the norm is
            taken, if it mixes pixels, or if the estimator cannot give each pixel a norm.
    """
    if scope in POOLED and (order > 1 or not estimator.pools):
        raise ValueError(
            f"scope={scope!r} takes order=1 with estimator='exact' or 'finite_difference'; got "
            f"order={order} with {estimator!r}"
        )
    if scope in POOLED and forward != "isolated":
        raise ValueError(
            f"scope={scope!r} averages gradients of the training forward passes, so it takes "
            f"forward='isolated'; got {forward!r}: use scope='batch'"
        )
    if scope == "pixel" and order > 1:
        raise ValueError(
            f'`scope="pixel"` takes order=1; got order={order}: a higher derivative mixes pixels, '
            'use scope="sample"'
        )
    if scope == "pixel" and not estimator.by_pixel:
        raise ValueError(
            "`scope=\"pixel\"` takes estimator='exact' or 'projection'; got " + repr(estimator)
        )


def check_part(axes: Any) -> None:
    """Refuse a part of the samples where the penalty of a part is not that of all on average.

    Raises:
        ValueError: if the groups are not samples, or the values are not averaged.
    """
    fraction = axes.subsample
    if fraction is None:
        return
    if not 0 < checks.number("subsample=...", fraction, 0) <= 1:
        raise ValueError(
            f"`subsample=...` must be a part of the samples, in (0, 1]; got {fraction!r}"
        )
    if not axes.wrt.batched and axes.scope != "sample":
        raise ValueError(
            f"subsample={fraction} takes a part of the samples' norms; scope={axes.scope!r} has "
            "one norm of their mean gradient, and that of a part of them is larger on average: "
            "use scope='sample', or compute the loss of a smaller batch"
        )
    if axes.reduce != "mean":
        raise ValueError(
            f"subsample={fraction} takes reduce='mean'; got {axes.reduce!r}, which is another "
            "number for a part of the samples"
        )


def require_groups(groups: Any, y: Tensor, xs: tuple[Tensor, ...], axes: Any) -> None:
    """Refuse a ``groups=`` that is no index of a group for each row, and axes that mix rows.

    Args:
        groups: the index of a group ``[N]`` for each row.
        y: the output, ``[G, ...]``.
        xs: the inputs, ``[N, *S]`` each.
        axes: of the penalty.

    Raises:
        TypeError: if it is no tensor of integers.
        ValueError: if its shape or an index does not fit, or for an order, an estimator, points or
            a scope that it does not go with.
    """
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.ndim != 1:
        found = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"groups= must be an index tensor [N], the group of each row; got {found}")
    rows, count = len(xs[0]), len(y) if y.ndim else 0
    inside = len(groups) == rows and holds(lambda: ((groups >= 0) & (groups < count)).all())
    low, high = (int(groups.min()), int(groups.max())) if len(groups) and not inside else (0, -1)
    if not inside and (len(groups) != rows or low < 0 or high >= count):
        raise ValueError(
            f"groups= must have a number from 0 to {count - 1} for each of {rows} rows, as the "
            f"output has {count} groups; got {len(groups)} numbers from {low} to {high}"
        )
    if axes.order > 1 or axes.scope != "sample" or not axes.estimator.by_group:
        raise ValueError(
            "groups= takes order=1, scope='sample' and estimator='exact' or 'projection'; got "
            f"order={axes.order}, scope={axes.scope!r}, {axes.estimator!r}"
        )
    if axes.subsample is not None:
        raise ValueError(
            f"groups= takes all rows; got subsample={axes.subsample}: choose the groups in the call"
        )
    if axes.at.moves:
        raise ValueError(
            f"groups= takes the points as they are; got at={type(axes.at).__name__}(), which draws "
            "for each row: make the points of each group first, penalty(f, points, groups=...)"
        )


def require_images(xs: tuple[Tensor, ...]) -> None:
    """Refuse inputs without pixels, or with different numbers of pixels.

    Raises:
        ValueError: if an input is not ``[B, C, *S]``, or S differs between inputs.
    """
    if any(x.ndim < 3 for x in xs) or len({x.shape[2:] for x in xs}) > 1:
        shapes = " and ".join(str(list(x.shape)) for x in xs)
        raise ValueError(
            f'`scope="pixel"` needs images [B, C, *S], the same S for all inputs; got {shapes}: '
            'use scope="sample"'
        )
