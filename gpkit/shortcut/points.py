"""The points of repeated calls, by the same numbers as `at` draws, from what is kept of earlier."""

from __future__ import annotations

import torch
from torch import Tensor

from gpkit.autodiff.numerics import WIDE
from gpkit.autodiff.random import CPU
from gpkit.axes.at import At, Points, data, interpolate, per_sample, perturb
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
        self.alpha = self.noise = torch.empty(0)  # overwritten at each call, and in no graph

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
        elif self.on_cpu and at.detach and real is not None and self.fits(real):
            if kind is interpolate and fake is not None and self.fits(fake):
                return (self.between(real.detach(), fake.detach(), seed),)
            if type(at) is perturb:
                return (self.around(at, real.detach(), seed),)
        rng = self.generator.manual_seed(seed)
        return at(None if real is None else (real,), None if fake is None else (fake,), rng)

    def fits(self, x: Tensor) -> bool:
        """Whether numbers can be drawn for samples into the tensors that are kept."""
        if x.dtype is self.dtype and x.shape == self.shape:
            return True
        if x.dtype in WIDE:
            self.shape, self.dtype = x.shape, x.dtype
            sizes = len(x), *[1] * (x.ndim - 1)
            self.alpha = torch.empty(sizes, dtype=torch.float32, device=CPU)
        return False

    def between(self, real: Tensor, fake: Tensor, seed: int) -> Tensor:
        """Return what `interpolate` does, with the same α."""
        alpha = self.alpha.uniform_(generator=self.generator.manual_seed(seed))
        return torch.lerp(fake, real, per_sample(alpha, real)).requires_grad_()

    def around(self, at: perturb, real: Tensor, seed: int) -> Tensor:
        """Return what `perturb` does, with the same α and u."""
        rng = self.generator.manual_seed(seed)
        if self.noise.shape != real.shape or self.noise.dtype != real.dtype:
            self.noise = torch.empty_like(real, memory_format=torch.contiguous_format)
        alpha = self.alpha.uniform_(generator=rng) if at.along else None
        u = (
            self.noise.normal_(generator=rng)
            if at.noise == "normal"
            else self.noise.uniform_(generator=rng)
        )
        delta = at.scaled(u, real)
        moved = (
            real + delta if alpha is None else torch.addcmul(real, per_sample(alpha, real), delta)
        )
        return moved.requires_grad_()
