"""A result: what is run, what is measured, and what is expected."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gpkit.report.groups import Spread


@dataclass(frozen=True)
class Number:
    """A metric of a row, and what its mean over the seeds is expected to be.

    Args:
        metric: its name in ``metrics.json``.
        expected: the number of the source; None if there is none.
        low: the least mean that agrees with it.
        high: the largest.
        scale: a factor of the metric, such as 100 for a share in %.
        finding: why gpkit's number differs from the source's; empty if it does not.
    """

    metric: str
    expected: float | None = None
    low: float = -math.inf
    high: float = math.inf
    scale: float = 1.0
    finding: str = ""

    def agrees(self, mean: float) -> bool:
        """Whether a mean agrees with the source.

        Args:
            mean: of the metric over the seeds, times the scale.

        Returns:
            Whether it is in [low, high].

        >>> Number("test/acc", 70.0, 67.0, 73.0).agrees(68.0)
        True
        """
        return self.low <= mean <= self.high


@dataclass(frozen=True)
class Row:
    """A result: the runs of one command over some seeds.

    Args:
        name: the result and the variant, as ``label_noise/none``.
        overrides: the arguments of ``python train.py``.
        numbers: what is measured.
        source: of the expected numbers.
        seeds: how many seeds, from 0 on.
        seconds: about how long a run takes on one core, to begin with the longest.
        program: the module that is run with these arguments.
    """

    name: str
    overrides: tuple[str, ...]
    numbers: tuple[Number, ...]
    source: str
    seeds: int = 3
    seconds: float = 10.0
    program: str = "gpkit"

    @property
    def command(self) -> str:
        """The command of one run."""
        start = "python train.py" if self.program == "gpkit" else f"python -m {self.program}"
        return " ".join([start, *self.overrides])


@dataclass
class Measured:
    """What the runs of a row have given.

    Args:
        row: the row.
        values: of each of its numbers, by seed.
        seconds: the wall time of each run.
        date: of the last run.
        problems: a line for each run that is not finished.
    """

    row: Row
    values: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    date: str = ""
    problems: list[str] = field(default_factory=list)

    def spread(self, number: Number) -> Spread | None:
        """Return the mean and the standard deviation of a number; None without a run."""
        values = [number.scale * v for v in self.values.get(number.metric, [])]
        return Spread.of(values) if values else None

    def verdict(self, number: Number) -> str:
        """Return "agrees", "differs", "explained" where a finding says why, "–", or "missing"."""
        spread = self.spread(number)
        if spread is None or self.problems:
            return "missing"
        if number.expected is None:
            return "–"
        if number.agrees(spread.mean):
            return "agrees"
        return "explained" if number.finding else "differs"
