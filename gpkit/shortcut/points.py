"""The points of repeated calls, by the same numbers as `at` draws, from what is kept of earlier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.numerics import WIDE
from gpkit.autodiff.random import CPU
from gpkit.axes.at import At, Points, data, interpolate, per_sample
from gpkit.axes.at import fake as fakes
from gpkit.axes.at import real as reals

SAMPLES = (data, reals, fakes)  # the points are samples


class Drawing:
    """Chooses points at each call; the generator and its numbers are made once.

    Args:
        device: of the samples.
    """

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device)
        self.on_cpu = device == CPU
        self.shape, self.dtype = torch.Size(), torch.float32
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
        elif kind is interpolate and real is not None and fake is not None and self.on_cpu:
            if self.fits(real) and self.fits(fake):  # in fewer operations than `interpolate`
                self.generator.manual_seed(seed)
                alpha = self.alpha.uniform_(generator=self.generator)
                return (torch.lerp(fake, real, per_sample(alpha, real)).requires_grad_(),)
            self.shape, self.dtype = real.shape, real.dtype
            size = len(real), *[1] * (real.ndim - 1)
            self.alpha = torch.empty(size, dtype=torch.float32)
        rng: Any = self.generator.manual_seed(seed) if at.moves else None
        return at(None if real is None else (real,), None if fake is None else (fake,), rng)

    def fits(self, x: Tensor) -> bool:
        """Whether samples have no graph, and the shape and dtype of those before."""
        plain = x.dtype is self.dtype and x.shape == self.shape and not x.requires_grad
        return plain and self.dtype in WIDE
