"""Points that are not on lines between samples: uniform in a box, and several kinds at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit import draws
from gpkit.draws import Source
from gpkit.points import At, Points, as_at, require_floating

Bound = float | Sequence[Any] | Tensor


@dataclass(frozen=True)
class uniform(At):  # noqa: N801  points read as functions: at=uniform(-1, 1)
    """Points from U[low, high] in every entry, as many and of the shape of the real samples.

    Args:
        low: the box's lower end: a number, or numbers that broadcast to one sample's shape, as one
            for each dimension of ``[B, d]``. Several inputs share the box.
        high: its upper end, likewise.

    Raises:
        ValueError: if an end is no finite number, or ``low`` is above ``high``.
    """

    low: Bound = 0.0
    high: Bound = 1.0

    moves = True

    def __post_init__(self) -> None:
        for name in ("low", "high"):  # plain numbers: equal boxes are equal, and have no device
            object.__setattr__(self, name, _numbers(f"uniform({name}=...)", getattr(self, name)))
        low, high = self.ends(torch.float64)
        try:
            above = bool((low > high).any())
        except RuntimeError:
            raise ValueError(
                "`uniform(low, high)` needs ends of shapes that broadcast; "
                f"got {list(low.shape)} and {list(high.shape)}"
            ) from None
        if above:
            raise ValueError(f"`uniform(low, high)` needs low <= high; got {self.low}, {self.high}")

    def ends(self, dtype: torch.dtype, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return both ends as tensors."""
        low, high = (torch.tensor(e, dtype=dtype, device=device) for e in (self.low, self.high))
        return low, high

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return tuple(self.inside(x, rng) for x in self.need(real, "real"))

    def inside(self, x: Tensor, rng: Source) -> Tensor:
        """Return points ``[B, *S]`` in the box, for an ``x`` of that shape."""
        require_floating(x)
        low, high = self.ends(x.dtype, x.device)
        for end in (low, high):
            fits = end.ndim < x.ndim and all(
                e in (1, n) for e, n in zip(end.shape[::-1], x.shape[:0:-1], strict=False)
            )
            if not fits:
                raise ValueError(
                    f"`uniform(low, high)` has ends of shape {list(end.shape)}, and a sample has "
                    f"{list(x.shape[1:])}: give a number, or one for each dimension"
                )
        u = draws.uniform(rng, x.shape, x.device, x.dtype)
        return low + (high - low) * u


@dataclass(frozen=True, init=False)
class mixture(At):  # noqa: N801
    """Several kinds of points at once: the batch is all of them, in order, and so is the mean.

    The function is evaluated once, on the concatenation ``[B1 + B2 + ..., *S]``: where it holds
    labels, these must be repeated.

    Args:
        *ats: the kinds: "data", ``gpkit.uniform(-1, 1)``, a function ``(real, fake) -> points``.
            Each cuts its own points off their graph, or not.
        equal: refuse kinds of different numbers of points, of which the larger would weigh more.

    Raises:
        ValueError: if there are none, or one has a name that no points have.
    """

    ats: tuple[At, ...] = ()
    equal: bool = False

    moves = True

    def __init__(self, *ats: str | At | Callable[[Any, Any], Any], equal: bool = False) -> None:
        if not ats:
            raise ValueError("`mixture(...)` needs at least one kind of points; got none")
        object.__setattr__(self, "ats", tuple(as_at("mixture(...)", at) for at in ats))
        object.__setattr__(self, "equal", equal)
        object.__setattr__(self, "detach", False)  # its parts have done it

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        parts = [
            tuple(x.detach() if at.detach else x for x in at.choose(real, fake, rng))
            for at in self.ats
        ]
        shapes = [[list(x.shape[1:]) for x in part] for part in parts]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                "`at=mixture(...)` needs samples of one shape from every part; got "
                + " and ".join(", ".join(map(str, shape)) for shape in shapes)
            )
        sizes = [len(part[0]) for part in parts]
        if self.equal and len(set(sizes)) > 1:
            raise ValueError(
                "`at=mixture(..., equal=True)` needs as many points from every part; got "
                + " and ".join(map(str, sizes))
            )
        return tuple(torch.cat(xs) for xs in zip(*parts, strict=True))


def _numbers(where: str, value: Any) -> Any:
    """Return a number, or nested tuples of numbers, or refuse."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(torch.nan)
    if isinstance(value, (bool, str)) or not tensor.isfinite().all():
        raise ValueError(f"`{where}` must be a finite number, or a sequence of them; got {value!r}")
    return _nested(tensor.tolist())


def _nested(value: Any) -> Any:
    return tuple(map(_nested, value)) if isinstance(value, list) else value
