"""The points of repeated calls, by the same numbers as `at` draws, from what is kept of earlier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.numerics import WIDE
from gpkit.axes.at import At, Points, data, interpolate, per_sample
from gpkit.axes.at import fake as fakes
from gpkit.axes.at import real as reals

SAMPLES = (data, reals, fakes)  # the points are samples


class Drawing:
    """Chooses points at each call; the generator and its numbers are made once."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None
        self.alpha = torch.empty(0)

    def points(self, at: At, real: Tensor | None, fake: Tensor | None, seed: int) -> Points:
        """Return the points of a call, which require grad.

        Args:
            at: chooses them.
            real: the real samples ``[B, *S]``, or None.
            fake: the fake samples ``[B, *S]``, or None.
            seed: of the random numbers.
        """
        kind = type(at)
        if kind in SAMPLES:
            x = fake if kind is fakes else real
            if x is not None and x.dtype in WIDE and not (x.requires_grad or x.is_inference()):
                return (x.detach().requires_grad_(),)
        elif kind is interpolate and real is not None and fake is not None and alike(real, fake):
            return (self.between(real, fake, seed),)
        rng: Any = None
        if at.moves:
            rng = self.source(fake if real is None else real, seed)
        return at(None if real is None else (real,), None if fake is None else (fake,), rng)

    def between(self, real: Tensor, fake: Tensor, seed: int) -> Tensor:
        """Return interpolates of samples on the CPU, in fewer operations than `interpolate`."""
        shape = real.shape
        if self.alpha.shape[:1] != shape[:1] or self.alpha.ndim != real.ndim:
            self.alpha = torch.empty(shape[0], *[1] * (len(shape) - 1), dtype=torch.float32)
        alpha = self.alpha.uniform_(generator=self.source(real, seed))
        return torch.lerp(fake, real, per_sample(alpha, real)).requires_grad_()

    def source(self, x: Any, seed: int) -> torch.Generator:
        """Return a generator where the samples x are."""
        device = x.device
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device)
        return self.generator.manual_seed(seed)


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether samples on the CPU have one shape and dtype, and no graph."""
    plain = x.is_cpu and y.is_cpu and x.dtype is y.dtype and x.dtype in WIDE
    return plain and x.shape == y.shape and not (x.requires_grad or y.requires_grad)
