"""More points for the axis `at`: uniform points in a box, and mixtures of several kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff import random
from gpkit.autodiff.random import Source
from gpkit.axes.at import At, Points, as_at, computed, data, require_floating

Bound = float | Sequence[Any] | Tensor


@dataclass(frozen=True)
class uniform(At):
    """Uniform points in a box: every entry is from U[low, high], in the shape of the real samples.

    Args:
        low: the lower bound: a number, or a sequence that broadcasts to the shape of one sample,
            such as one number for each dimension of ``[B, d]``. Several inputs share the box.
        high: the upper bound, likewise.
        detach: cut the points off the graph that computed them.

    Raises:
        ValueError: if a bound is not finite, or ``low`` is above ``high``.

    >>> x = torch.zeros(2, 3)
    >>> (z,) = uniform(-1, [1, 2, 3])((x,), None, torch.Generator().manual_seed(0))
    >>> bool((z >= -1).all() and (z <= torch.tensor([1, 2, 3])).all())
    True
    """

    low: Bound = 0.0
    high: Bound = 1.0

    moves = True
    reads = ("real",)

    def __post_init__(self) -> None:
        for name in ("low", "high"):  # as plain numbers, so that equal boxes compare equal
            object.__setattr__(self, name, _numbers(f"uniform({name}=...)", getattr(self, name)))
        low, high = self.ends(torch.float64)
        try:
            above = bool((low > high).any())
        except RuntimeError:
            raise ValueError(
                "`uniform(low, high)` needs bounds whose shapes broadcast; "
                f"got {list(low.shape)} and {list(high.shape)}"
            ) from None
        if above:
            raise ValueError(f"`uniform(low, high)` needs low <= high; got {self.low}, {self.high}")

    def ends(self, dtype: torch.dtype, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return both bounds as tensors."""
        low, high = (torch.tensor(e, dtype=dtype, device=device) for e in (self.low, self.high))
        return low, high

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return tuple(self.inside(x, rng) for x in self.need(real, "real"))

    def inside(self, x: Tensor, rng: Source) -> Tensor:
        """Return uniform points in the box, in the shape ``[B, *S]`` of ``x``."""
        require_floating(x)
        low, high = self.ends(x.dtype, x.device)
        for end in (low, high):
            fits = end.ndim < x.ndim and all(
                e in (1, n) for e, n in zip(end.shape[::-1], x.shape[:0:-1], strict=False)
            )
            if not fits:
                raise ValueError(
                    f"`uniform(low, high)` has bounds of shape {list(end.shape)}, which does not "
                    f"broadcast to a sample {list(x.shape[1:])}: use a number, or one per dimension"
                )
        u = random.uniform(rng, x.shape, x.device, x.dtype)
        return low + (high - low) * u


@dataclass(frozen=True, init=False)
class mixture(At):
    """Several kinds of points, concatenated into one batch ``[B1 + B2 + ..., *S]``.

    The penalty is the mean over this batch. The function is evaluated once, on all of it; a
    function that uses labels must repeat them.

    Args:
        *ats: the kinds of points: names such as "data", objects such as ``gpkit.uniform(-1, 1)``,
            or functions ``(real, fake) -> points``. Each kind has its own ``detach``.
        equal: refuse kinds with different numbers of points; the larger would have more weight.
        balanced: give each kind the same weight in the mean, however many points it has: the
            penalty is the mean of the kinds' means.

    Raises:
        ValueError: if ``ats`` is empty, a name is unknown, or ``balanced`` is used with a function,
            whose number of points is not known.

    >>> x = torch.ones(2, 3)
    >>> at = mixture("data", lambda real, fake: 2 * real)
    >>> (z,) = at((x,), None, torch.Generator())
    >>> z[:, 0].tolist()
    [1.0, 1.0, 2.0, 2.0]
    """

    ats: tuple[At, ...] = ()
    equal: bool = False
    balanced: bool = False

    moves = True

    def __init__(
        self,
        *ats: str | At | Callable[[Any, Any], Any],
        equal: bool = False,
        balanced: bool = False,
    ) -> None:
        if not ats:
            raise ValueError("`mixture(...)` needs at least one kind of points; got none")
        object.__setattr__(self, "ats", tuple(as_at("mixture(...)", at) for at in ats))
        object.__setattr__(self, "equal", equal)
        object.__setattr__(self, "balanced", balanced)
        if balanced and any(isinstance(at, computed) for at in self.ats):
            raise ValueError(
                "`mixture(..., balanced=True)` needs kinds whose number of points is known, such "
                "as 'real' and 'fake'; got a function"
            )
        object.__setattr__(self, "detach", False)  # each part has its own
        parts = [at.samples for at in self.ats]
        object.__setattr__(self, "reads", tuple({kind: 0 for at in self.ats for kind in at.reads}))
        # A GAN's step has as many fake samples as real ones, so their scores weigh the same.
        object.__setattr__(self, "samples", sum(parts, ()) if all(parts) else ())

    def sizes(self, real: Points | None, fake: Points | None) -> tuple[int, ...]:
        return tuple(sum(at.sizes(real, fake)) for at in self.ats)

    def weights(self, real: Points | None, fake: Points | None) -> Tensor | None:
        if not self.balanced:
            return None
        given = self.sizes(real, fake)
        if len(set(given)) == 1:
            return None
        sizes = torch.tensor(given)
        return (sizes.sum() / (len(sizes) * sizes.double())).repeat_interleave(sizes)

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        parts = [
            tuple(x.detach() if at.detach else x for x in at.choose(real, fake, rng))
            for at in self.ats
        ]
        shapes = [[list(x.shape[1:]) for x in part] for part in parts]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                "`at=mixture(...)` needs samples of the same shape from each part; got "
                + " and ".join(", ".join(map(str, shape)) for shape in shapes)
            )
        sizes = [len(part[0]) for part in parts]
        if self.equal and len(set(sizes)) > 1:
            raise ValueError(
                "`at=mixture(..., equal=True)` needs the same number of points from each part; got "
                + " and ".join(map(str, sizes))
            )
        return tuple(torch.cat(xs) for xs in zip(*parts, strict=True))


@dataclass(frozen=True, init=False)
class part(At):
    """A random part of other points: ⌈fraction·B⌉ of B samples, drawn anew at each call.

    Args:
        at: the points.
        fraction: of them, in (0, 1].

    >>> x = torch.arange(8.0).reshape(8, 1)
    >>> (z,) = part(as_at("at", "real"), 0.25)((x,), None, torch.Generator().manual_seed(0))
    >>> z.shape
    torch.Size([2, 1])
    """

    at: At = field(default_factory=data)
    fraction: float = 1.0

    moves = True

    def __init__(self, at: At, fraction: float) -> None:
        for name, own in {"at": at, "fraction": fraction, "detach": at.detach}.items():
            object.__setattr__(self, name, own)
        object.__setattr__(self, "reads", at.reads)

    def sizes(self, real: Points | None, fake: Points | None) -> tuple[int, ...]:
        return (size_of(sum(self.at.sizes(real, fake)), self.fraction),)

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        if self.at.weights(real, fake) is not None:
            raise ValueError(
                f"subsample={self.fraction} takes points that weigh the same; got {self.at!r}: "
                "use one penalty for each kind of points, gpkit.sum([...]), or leave subsample= out"
            )
        points = self.at.choose(real, fake, rng)
        rows = rows_of(len(points[0]), self.fraction, rng, points[0].device)
        return tuple(x[rows] for x in points)


def size_of(count: int, fraction: float) -> int:
    """Return ⌈fraction·count⌉, at least one of them if there are any."""
    return min(count, max(1, math.ceil(fraction * count - 1e-9)))  # 0.1·30 is above 3


def rows_of(count: int, fraction: float, rng: Source, device: torch.device) -> Tensor:
    """Return the numbers of a random part of the rows; each part of that size is as likely."""
    order = random.uniform(rng, [count], device, torch.float64).argsort()
    return order[: size_of(count, fraction)]


def _numbers(where: str, value: Any) -> Any:
    """Return a number or nested tuples of numbers; raise a ValueError for anything else."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(torch.nan)
    if isinstance(value, (bool, str)) or not tensor.isfinite().all():
        raise ValueError(f"`{where}` must be a finite number, or a sequence of them; got {value!r}")
    return _nested(tensor.tolist())


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value
