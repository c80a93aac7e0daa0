"""Draws: what a call of a penalty draws at random, outside of its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.random import seeded
from gpkit.autodiff.tracing.calls import Drawn
from gpkit.autodiff.tracing.noise import Noise


@dataclass(frozen=True)
class Draws:
    """What a call of a penalty draws at random.

    Args:
        numbers: of its points and estimator.
        noise: of the dropout in each of its own forward passes, which start from the same seed.
        device: of these passes.
    """

    numbers: Sequence[Drawn]
    noise: Sequence[Sequence[Noise]]
    device: torch.device

    def __bool__(self) -> bool:
        return bool(self.numbers) or any(self.noise)

    def anew(self, seed: int) -> list[Tensor]:
        """Return the random numbers for a seed."""
        found: list[Tensor] = []
        if self.numbers:
            rng = torch.Generator(self.numbers[0].device).manual_seed(seed)
            found += [own.anew(rng) for own in self.numbers]
        for own in filter(None, self.noise):
            with torch.no_grad(), seeded(seed, self.device):
                found += [noise.anew(self.device) for noise in own]
        return found


def drawn_anew(penalty: Any, draws: Draws) -> list[Tensor]:
    """Return the random numbers of the next call of a penalty, and count it."""
    if draws or penalty.seed is None:
        return draws.anew(penalty.next_seed())
    penalty.draws += 1  # the seed itself takes a hash
    return []
