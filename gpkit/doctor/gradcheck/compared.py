"""Two ways to the same number: are they equal, also if the penalty draws random numbers?"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from gpkit.doctor.gradcheck.trial import Call, Run, Trial

DRAWS = 60  # of a random estimate, to compare means
DEVIATIONS = 6.0  # of the difference of two means, beyond which they differ

Way = Callable[[int, list[Call] | None], float]  # (seed, points of another run) -> value


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a penalty before it is compared with itself.

    Args:
        trial: the penalty.
        run: its run at seed 0, with its gradient.
        drawn: whether its value is another one at another seed.
        estimated: whether it is also another one at the same points.
        points: the calls of the net in `run`, if the net can be evaluated at the same points again.
    """

    trial: Trial
    run: Run
    drawn: bool
    estimated: bool
    points: list[Call] | None

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding explains."""
        return 1e-6 if self.run.dtype == torch.float64 else 2e-3

    def close(self, a: float, b: float, factor: float = 1.0) -> bool:
        """Whether two numbers are equal but for rounding."""
        return abs(a - b) <= factor * self.tolerance * max(abs(a), abs(b), 1e-30)

    def same(self, way: Way) -> tuple[bool, float, float]:
        """Return whether another way gives the same value, and the values, or their means.

        First from the same seed. If random numbers can explain a difference, then with the net at
        the same points; and if it is still an estimate, on average.
        """
        a, b = self.run.value, way(0, None)
        if self.close(a, b) or not self.drawn:
            return self.close(a, b), a, b
        if self.points is not None:
            b = way(0, self.points)
            if self.close(a, b) or not self.estimated:
                return self.close(a, b), a, b
        draws = [way(seed + DRAWS, self.points) for seed in range(DRAWS)]
        a, b = statistics.fmean(self.draws), statistics.fmean(draws)
        error = ((statistics.variance(self.draws) + statistics.variance(draws)) / DRAWS) ** 0.5
        return abs(a - b) <= DEVIATIONS * error or self.close(a, b), a, b

    @cached_property
    def draws(self) -> list[float]:
        """Values at many seeds, at the same points."""
        return [self.trial.value(seed, at=self.points) for seed in range(DRAWS)]


def known(trial: Trial) -> Known:
    """Run a penalty a few times, to know what it draws and where the net is evaluated."""
    trial.run()  # what a net is asked only the first time is not repeated below
    run = trial.run(gradient=True)
    points = run.calls if usable(run.calls, trial) else None
    others = [trial.value(seed) for seed in (1, 2)]
    drawn = any(other != run.value for other in others)
    found = Known(trial, run, drawn, False, points)
    if not drawn:
        return found
    if points is not None:
        others = [trial.value(seed, at=points) for seed in (1, 2)]
    estimated = not all(found.close(other, run.value) for other in others)
    return Known(trial, run, drawn, estimated, points)


def usable(calls: list[Call], trial: Trial) -> bool:
    """Whether the net was run on whole batches of samples that require grad."""
    return bool(calls) and all(
        call.variables and all(_is_batch(call, i, trial) for i in call.variables) for call in calls
    )


def _is_batch(call: Call, i: int, trial: Trial) -> bool:
    x = call.tensors[i]
    if x.ndim == 0 or len(x) == 0 or len(x) % trial.batch:
        return False
    try:
        x.sum().item()
    except RuntimeError:  # it has escaped from vmap
        return False
    return True
