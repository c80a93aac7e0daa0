"""Points: where a derivative is taken, given real and fake samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.deviation import batch_std
from gpkit.draws import Source, normal, uniform

Points = tuple[Tensor, ...]  # one tensor [B, *S] for every input of the function


@dataclass(frozen=True, kw_only=True)
class At:
    """Where the derivative is taken.

    Args:
        detach: cut the points off the graph that made them (a generator's, say). With
            ``detach=False`` the penalty also trains what made the points.
    """

    detach: bool = True

    # Whether the points are the samples as they were given: then a graph that the caller already
    # has can be reused, and no second forward is needed.
    moves = False

    def __call__(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        """Return the points, ready to be differentiated at: they require grad."""
        points = self.choose(real, fake, rng)
        for x in points:
            require_floating(x)
        if self.detach:
            points = tuple(x.detach() for x in points)
        # An inference tensor cannot enter a graph; a copy made outside that mode can.
        points = tuple(x.clone() if x.is_inference() else x for x in points)
        return tuple(x if x.requires_grad else x.detach().requires_grad_() for x in points)

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        """Return the points before they are detached."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(real, fake, rng)")

    def need(self, samples: Points | None, kind: str) -> Points:
        """Return ``samples``, or refuse because the call had none of this kind."""
        if samples is None:
            raise ValueError(f"`at={type(self).__name__}()` needs {kind}=..., which was not given")
        return samples


@dataclass(frozen=True, kw_only=True)
class real(At):  # noqa: N801  points read as functions: at=interpolate()
    """The real samples: x."""

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return self.need(real, "real")


@dataclass(frozen=True, kw_only=True)
class data(real):  # noqa: N801
    """The data that the penalty was called with: x."""


@dataclass(frozen=True, kw_only=True)
class fake(At):  # noqa: N801
    """The fake samples: y."""

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return self.need(fake, "fake")


@dataclass(frozen=True, kw_only=True)
class interpolate(At):  # noqa: N801
    """Interpolates α x + (1 - α) y of real x and fake y, one α in U[0, 1] for every sample.

    With several inputs a sample has one α for all of them.
    """

    moves = True

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        real, fake = self.need(real, "real"), self.need(fake, "fake")
        shapes = [list(x.shape) for x in real], [list(y.shape) for y in fake]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "`at=interpolate()` needs real and fake samples of the same shape; "
                f"got {' and '.join(str(s[0] if len(s) == 1 else s) for s in shapes)}"
            )
        alpha = uniform(rng, [len(real[0])], real[0].device, torch.float32)  # [B]
        return tuple(y + per_sample(alpha, x) * (x - y) for x, y in zip(real, fake, strict=True))


@dataclass(frozen=True)
class perturb(At):  # noqa: N801
    """x + s·u: the real samples with noise, as in DRAGAN.

    Args:
        scale: s.
        noise: "normal", u ~ N(0, I), or "uniform", u ~ U[-1, 1] in every entry.
        relative: multiply s by the standard deviation over all entries of the batch, that of all
            ranks in a distributed run; each of several inputs has its own.
        along: take a point between x and its perturbation: x + α·s·u, one α in U[0, 1] a sample.
    """

    scale: float = 0.1
    noise: str = "normal"
    relative: bool = False
    along: bool = False

    moves = True

    def __post_init__(self) -> None:
        checks.number("perturb(scale=...)", self.scale, 0)
        checks.choice("perturb(noise=...)", self.noise, ("normal", "uniform"))

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        real = self.need(real, "real")
        alpha = torch.ones(len(real[0]), device=real[0].device)
        if self.along:
            alpha = uniform(rng, [len(alpha)], alpha.device, alpha.dtype)
        return tuple(x + per_sample(alpha, x) * self.delta(x, rng) for x in real)

    def delta(self, x: Tensor, rng: Source) -> Tensor:
        """Return the noise at full strength, ``[B, *S]``."""
        require_floating(x)
        draw = normal if self.noise == "normal" else uniform
        u = draw(rng, x.shape, x.device, x.dtype)
        u = u if self.noise == "normal" else 2 * u - 1
        return u * self.scale * (batch_std(x) if self.relative else 1.0)


@dataclass(frozen=True)
class computed(At):  # noqa: N801
    """Points of your own: ``function(real, fake)``, a tensor or a tuple of them.

    ``real`` and ``fake`` come as they were given to the penalty: None where they were not.
    """

    function: Callable[[Any, Any], Any]

    moves = True

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return as_points(self.function(unwrap(real), unwrap(fake)))


POINTS = {p.__name__: p for p in (data, real, fake, interpolate, perturb)}


def as_at(where: str, at: Any) -> At:
    """Return points for what the user said: an object, a name, or a function of their own.

    Raises:
        ValueError: if a name is none of `POINTS`.
        TypeError: if it is anything else.
    """
    if callable(at) and not isinstance(at, At):
        return computed(at)
    points: At = checks.piece(where, at, POINTS, At)
    return points


def per_sample(alpha: Tensor, x: Tensor) -> Tensor:
    """Return α [B] in the dtype of x [B, *S], with dimensions of size one to multiply it by."""
    return alpha.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def as_points(x: Any) -> Points:
    """Return a tensor, or several, as a tuple.

    Raises:
        TypeError: if there is anything else.
        ValueError: if they do not share a batch dimension.
    """
    points = tuple(x) if isinstance(x, (list, tuple)) else (x,)
    for point in points:
        if not isinstance(point, Tensor):
            raise TypeError(
                f"samples must be a tensor [B, ...] or a tuple of them; got {type(point).__name__}"
            )
    if not points or any(p.ndim == 0 or len(p) != len(points[0]) for p in points):
        raise ValueError(
            "samples must have a batch dimension, the same for all inputs: [B, ...]; "
            f"got {[list(p.shape) for p in points]}"
        )
    return points


def unwrap(points: Points | None) -> Tensor | Points | None:
    """Return the one tensor of a tuple of one, and anything else as it is."""
    return points[0] if points is not None and len(points) == 1 else points


def require_floating(x: Tensor) -> None:
    """Refuse a tensor that has no derivative.

    Raises:
        TypeError: if ``x`` is not of a floating-point dtype.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"a gradient needs floating-point samples; got {x.dtype}: "
            "penalise what is computed from them (an embedding), or the weights"
        )
