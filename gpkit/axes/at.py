"""The axis `at`: the points where the derivative is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff import random
from gpkit.autodiff.distributed import batch_std
from gpkit.autodiff.random import Source
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.autodiff.tracing.points import variable

Points = tuple[Tensor, ...]  # one tensor [B, *S] for each input of the function


@dataclass(frozen=True, kw_only=True)
class At:
    """The points where the derivative is taken. The base class of `at`.

    A subclass defines one method, ``choose``, and sets ``moves = True`` if its points differ from
    the samples.

    Args:
        detach: cut the points off the graph that computed them, such as a generator's. With
            ``detach=False`` the penalty also trains the generator.

    >>> from dataclasses import dataclass
    >>> import gpkit
    >>> @dataclass(frozen=True, kw_only=True)
    ... class midpoints(At):
    ...     moves = True
    ...     def choose(self, real, fake, rng):
    ...         return tuple((x + y) / 2 for x, y in zip(real, fake, strict=True))
    >>> penalty = gpkit.GradientPenalty(at=midpoints())
    >>> x, y = torch.ones(8, 1), torch.zeros(8, 1)
    >>> penalty(lambda x: (x**2).sum(1), real=x, fake=y).item()  # (2·½)²
    1.0
    """

    detach: bool = True

    # False if the points are the samples themselves: then the penalty reuses the graph that the
    # caller has, and no second forward pass is needed.
    moves = False

    # The kinds of samples that ``choose`` reads, and those that the points are, in their order.
    reads: ClassVar[tuple[str, ...]] = ("real", "fake")
    samples: ClassVar[tuple[str, ...]] = ()

    def __call__(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        """Return the points, detached if ``detach``, as tensors that require grad."""
        return tuple([self.variable(x) for x in self.choose(real, fake, rng)])

    def variable(self, x: Tensor) -> Tensor:
        """Return a point as a tensor that requires grad, cut off its graph if ``detach``."""
        if not x.is_floating_point():
            require_floating(x)
        # An inference tensor cannot enter a graph; a copy made outside that mode can.
        x = x.clone() if not TRACES and x.is_inference() else x
        if x.requires_grad and not self.detach:
            return x
        return variable(x) if TRACES else x.detach().requires_grad_()

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        """Return the points, before ``detach``: ``[B, *S]`` for each input of the function."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(real, fake, rng)")

    def sizes(self, real: Points | None, fake: Points | None) -> tuple[int, ...]:
        """Return the number of points of each kind: one for the default, that of real or fake."""
        reads_fake = real is None or self.reads == ("fake",)
        return (len(self.need(fake if reads_fake else real, "fake" if reads_fake else "real")[0]),)

    def weights(self, real: Points | None, fake: Points | None) -> Tensor | None:
        """Return the weight of each point ``[B]`` in the mean; None if all weigh the same."""
        return None

    def need(self, samples: Points | None, kind: str) -> Points:
        """Return ``samples``, or raise a ValueError if the call had no samples of this kind."""
        if samples is None:
            raise ValueError(f"`at={type(self).__name__}()` needs {kind}=..., which was not given")
        return samples


@dataclass(frozen=True, kw_only=True)
class real(At):
    """The real samples: x."""

    reads = samples = ("real",)

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return self.need(real, "real")


@dataclass(frozen=True, kw_only=True)
class data(real):
    """The samples passed to the call: x."""


@dataclass(frozen=True, kw_only=True)
class fake(At):
    """The fake samples: y."""

    reads = samples = ("fake",)

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return self.need(fake, "fake")


@dataclass(frozen=True, kw_only=True)
class interpolate(At):
    r"""Interpolates between real samples x and fake samples y, as in WGAN-GP.

    .. math:: \hat x_i = \alpha_i x_i + (1 - \alpha_i) y_i, \quad \alpha_i \sim U[0, 1]

    Each sample has one α; with several inputs it is the same for all of them. Integer samples, such
    as one-hot tokens, take the dtype of the floating-point ones.

    Args:
        detach: cut the points off the graph that computed them.

    Source: Gulrajani et al. (2017), arXiv:1704.00028.

    >>> x, y = torch.ones(2, 3), torch.zeros(2, 3)
    >>> (z,) = interpolate()((x,), (y,), torch.Generator().manual_seed(0))
    >>> bool((z == z[:, :1]).all() and (z >= 0).all() and (z <= 1).all())
    True
    """

    moves = True

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        if real is None or fake is None:
            real, fake = self.need(real, "real"), self.need(fake, "fake")
        if [x.shape for x in real] != [y.shape for y in fake]:
            shapes = [list(x.shape) for x in real], [list(y.shape) for y in fake]
            raise ValueError(
                "`at=interpolate()` needs real and fake samples of the same shape; "
                f"got {' and '.join(str(s[0] if len(s) == 1 else s) for s in shapes)}"
            )
        first = real[0]
        alpha = random.uniform(rng, [first.shape[0]], first.device, torch.float32)  # [B]
        return tuple([self.between(x, y, alpha) for x, y in zip(real, fake, strict=True)])

    def between(self, x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        """Return α x + (1 - α) y."""
        if x.dtype != y.dtype:
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        if not x.is_floating_point():
            require_floating(x)  # before α, which would be rounded to integers
        return torch.lerp(y, x, per_sample(alpha, x))


NOISES = ("normal", "uniform", "positive")


@dataclass(frozen=True)
class perturb(At):
    """Real samples with noise, as in DRAGAN: x + s·u, or x + α·s·u with ``along``.

    Args:
        scale: s.
        noise: "normal", u ~ N(0, I); "uniform", u ~ U[-1, 1] in every entry; or "positive",
            u ~ U[0, 1), as in the code that DRAGAN's authors published.
        relative: multiply s by the standard deviation over all entries of the batch, and of all
            ranks in a distributed run. Each of several inputs has its own standard deviation.
        along: take a point between x and x + s·u: x + α·s·u, with one α ~ U[0, 1] per sample.
        detach: cut the points off the graph that computed them.

    Raises:
        ValueError: if ``scale`` is negative, or ``noise`` is another name.

    Source: Kodali et al. (2017), arXiv:1705.07215.

    >>> x = torch.zeros(2, 3)
    >>> (z,) = perturb(0.5, noise="uniform")((x,), None, torch.Generator().manual_seed(0))
    >>> bool((z.abs() <= 0.5).all())
    True
    """

    scale: float = 0.1
    noise: str = "normal"
    relative: bool = False
    along: bool = False

    moves = True
    reads = ("real",)

    def __post_init__(self) -> None:
        checks.number("perturb(scale=...)", self.scale, 0)
        checks.choice("perturb(noise=...)", self.noise, NOISES)

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        real = self.need(real, "real")
        if not self.along:
            return tuple(x + self.delta(x, rng) for x in real)
        alpha = random.uniform(rng, [len(real[0])], real[0].device, torch.float32)  # [B]
        return tuple(torch.addcmul(x, per_sample(alpha, x), self.delta(x, rng)) for x in real)

    def delta(self, x: Tensor, rng: Source) -> Tensor:
        """Return s·u ``[B, *S]``, with s relative to the batch if ``relative``."""
        require_floating(x)
        draw = random.normal if self.noise == "normal" else random.uniform
        return self.scaled(draw(rng, x.shape, x.device, x.dtype), x)

    def scaled(self, u: Tensor, x: Tensor) -> Tensor:
        """Return s·u for numbers from N(0, 1) or U[0, 1); they are overwritten."""
        s = self.scale * batch_std(x) if self.relative else self.scale
        if TRACES:  # they are inputs of the graph
            return (2 * u - 1 if self.noise == "uniform" else u) * s
        return (u.mul_(2).sub_(1) if self.noise == "uniform" else u).mul_(s)


@dataclass(frozen=True)
class computed(At):
    """Points from your function: ``function(real, fake)`` returns a tensor or a tuple of tensors.

    Args:
        function: called with ``real`` and ``fake`` as passed to the penalty; None if not passed.
        detach: cut the points off the graph that computed them.
    """

    function: Callable[[Any, Any], Any]

    moves = True

    def choose(self, real: Points | None, fake: Points | None, rng: Source) -> Points:
        return as_points(self.function(unwrap(real), unwrap(fake)))


POINTS = {p.__name__: p for p in (data, real, fake, interpolate, perturb)}


def as_at(where: str, at: Any) -> At:
    """Return an `At` for an object, a name in `POINTS`, or a function ``(real, fake) -> points``.

    Raises:
        ValueError: if the name is not in `POINTS`.
        TypeError: if it is anything else.
    """
    checks.an_object(where, at)
    if callable(at) and not isinstance(at, At):
        return computed(at)
    points: At = checks.piece(where, at, POINTS, At)
    return points


def per_sample(alpha: Tensor, x: Tensor) -> Tensor:
    """Return α [B] in the dtype of x [B, *S], with dimensions of size one to multiply it by."""
    alpha = alpha if alpha.dtype == x.dtype else alpha.to(x.dtype)
    return alpha if alpha.ndim == x.ndim else alpha.reshape(-1, *[1] * (x.ndim - 1))


def as_points(x: Any) -> Points:
    """Return a tensor, or a tuple or list of tensors, as a tuple.

    Raises:
        TypeError: if it is anything else.
        ValueError: if the tensors do not have the same batch size.
    """
    if isinstance(x, Tensor) and x.ndim:
        return (x,)
    points = tuple(x) if isinstance(x, (list, tuple)) else (x,)
    for point in points:
        if not isinstance(point, Tensor):
            raise TypeError(
                f"samples must be a tensor [B, ...] or a tuple of them; got {type(point).__name__}"
            )
    if not points or any(p.shape[:1] != points[0].shape[:1] or p.ndim == 0 for p in points):
        raise ValueError(
            "samples must be [B, ...], with the same batch size B for all inputs; "
            f"got {[list(p.shape) for p in points]}"
        )
    return points


def unwrap(points: Points | None) -> Tensor | Points | None:
    """Return the tensor of a tuple of one, and anything else unchanged."""
    return points[0] if points is not None and len(points) == 1 else points


def require_floating(x: Tensor) -> None:
    """Refuse samples that cannot require grad.

    Raises:
        TypeError: if the dtype of ``x`` is not floating-point.
    """
    if x.is_complex():
        raise TypeError(
            f"a penalty takes real samples; got {x.dtype}: give it torch.view_as_real(x), and a "
            "function that begins with torch.view_as_complex"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"a gradient needs floating-point samples; got {x.dtype}: "
            "use their embedding, wrt=gpkit.activation(...), or a weight penalty"
        )
