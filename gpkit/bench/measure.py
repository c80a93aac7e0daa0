"""`bench`: time, memory, operations and error of penalties on a net of your own."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.bench.counted import flops_of, memory_of
from gpkit.bench.steps import Steps, keeping_buffers, pair_of
from gpkit.bench.variants import by_name, variants
from gpkit.penalty import Penalty

SEEDS = 8  # of an estimate, to measure its error


@dataclass(frozen=True)
class Row:
    """What one penalty costs with one estimator, in plain steps.

    Args:
        penalty: its name.
        estimator: the name of the estimator.
        time: the median of the ratios to a plain step beside it, for a step on which it acts.
        compiled: the same of the step as one graph, see `gpkit.compile`; a plain step is not
            compiled. NaN if it was not measured.
        low: the lower quartile.
        high: the upper quartile.
        flops: counted operations of matrix products and convolutions, in plain steps: what the time
            comes down to in a large net. NaN if they cannot be counted.
        memory: the peak of what is allocated in a step, in plain steps. NaN if it is unknown.
        error: the relative error of the parameter gradient, against exact in float64: the root mean
            square over several draws. NaN if there is no exact estimator, or it is unknown.
        refused: why it cannot be measured; "" if it can.
        obstacle: why it is not compiled; "" if it is, or was not tried.
        unknown: why the error is not known; "" if it is, or there is no exact estimator.
        differs: whether it takes differences, so that it is not exact however small its error is.
    """

    penalty: str
    estimator: str
    time: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    flops: float = float("nan")
    memory: float = float("nan")
    error: float = float("nan")
    refused: str = ""
    compiled: float = float("nan")
    obstacle: str = ""
    unknown: str = ""
    differs: bool = False

    @property
    def least(self) -> float:
        """The least time."""
        return min(self.time, self.compiled) if self.compiled == self.compiled else self.time

    @property
    def words(self) -> str:
        """The estimator, and whether it is compiled, with the least time."""
        how = "" if self.least == self.time else " compiled"
        return f"{self.estimator}{how}, {self.least:.2f} plain steps"


@dataclass(frozen=True)
class Benchmark:
    """The rows of a benchmark.

    Args:
        rows: one for each penalty and estimator.
        plain: the seconds of a plain step.
        within: the error that is tolerated.
    """

    rows: tuple[Row, ...]
    plain: float
    within: float

    def cheapest(self, penalty: str, error: float) -> Row | None:
        """Return the row of a penalty with the least time among those within an error.

        No difference is within an error of `EXACT`.
        """
        own = [r for r in self.rows if r.penalty == penalty and r.error <= error]
        fit = [r for r in own if error > EXACT or not r.differs]
        return min(fit, key=lambda r: r.least, default=None)

    def advice(self) -> list[str]:
        """Return a line for each penalty: the cheapest estimators, exact and within the error."""
        lines = []
        for name in dict.fromkeys(row.penalty for row in self.rows):
            exact, other = self.cheapest(name, EXACT), self.cheapest(name, self.within)
            said = [
                f"{kind}: {row.words}"
                for kind, row in (("exact", exact), (f"within {self.within:.0%}", other))
                if row is not None
            ]
            lines.append(f"{name}: {'; '.join(said) or self._neither(name)}")
        if any(row.high > UNSTEADY * row.low for row in self.rows):
            lines.append(
                "the times are not steady, as beside other work: wait for it, or take more rounds"
            )
        return lines

    def _neither(self, penalty: str) -> str:
        measured = [r for r in self.rows if r.penalty == penalty and not r.refused]
        if not measured:
            return "no estimator can be measured"
        if any(math.isfinite(row.error) for row in measured):
            return "no estimator is within the error"
        return "no error is known: " + min(measured, key=lambda r: r.least).words

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON; what is not known is None."""
        rows = [
            {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in asdict(row).items()}
            for row in self.rows
        ]
        return {"plain_seconds": self.plain, "within": self.within, "rows": rows}


UNSTEADY = 2.0  # the upper quartile by the lower one
EXACT = 1e-4  # the rounding of float32, through a derivative


def bench(
    net: nn.Module,
    penalties: Penalty | Mapping[str, Penalty] | Iterable[Penalty],
    example: Tensor | tuple[Tensor, Tensor],
    *,
    losses: Callable[[Tensor, Tensor], Tensor] | None = None,
    rounds: int = 20,
    within: float = 0.1,
    compile: bool = False,
) -> Benchmark:
    """Measure what penalties cost with each estimator, on a net and this machine.

    A step is a forward and a backward pass of loss and penalty. Steps with and without a penalty
    take turns, so that a load on the machine slows both.

    Args:
        net: the net; its ``.grad`` is set to None.
        penalties: one, several, or several by name. They are not changed. A schedule of a weight
            counts as 1, and steps that ``every`` leaves out are not taken.
        example: a batch: x ``[B, *S]``, or (x, y).
        losses: (output, y) -> ``[B]``; None is the cross-entropy for integers, else the square.
        rounds: how many steps of each are timed.
        within: the error of the penalty's parameter gradient that is tolerated.
        compile: whether to measure each step as one graph as well, see `gpkit.compile`, which takes
            some ten seconds each.

    Returns:
        The rows, and which estimators to take.

    Raises:
        ValueError: if ``rounds`` < 1, ``within`` is negative, or nothing in the net is trained.
        TypeError: if ``penalties`` or ``example`` are something else.

    >>> import gpkit
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    >>> found = bench(net, gpkit.r1(), torch.randn(8, 3), rounds=1)
    >>> [row.estimator for row in found.rows]
    ['exact', 'finite_difference', 'projection']
    """
    checks.integer("bench(rounds=...)", rounds, 1)
    checks.number("bench(within=...)", within, 0)
    named = by_name(penalties)
    steps = Steps(net, *pair_of(example), losses)
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("bench(net, ...) needs a net with parameters that require grad; got none")
    with keeping_buffers(net):
        return measured(steps, named, rounds, within, compile)


def measured(
    steps: Steps, penalties: Mapping[str, Penalty], rounds: int, within: float, compile: bool
) -> Benchmark:
    """Return the rows of a benchmark."""
    steps.plain()  # an error of the net itself is raised
    cases, rows, net = {}, {}, steps.net
    for name, penalty in penalties.items():
        for estimator, made in variants(penalty).items():
            try:
                steps.penalised(made)  # the first one does some work once
            except Exception as refusal:  # whatever it is, the others are measured
                rows[name, estimator] = Row(name, estimator, refused=line_of(refusal))
                continue
            try:
                cases[name, estimator] = made, error_of(steps, penalty, made), ""
            except Exception as refusal:  # as of a net that takes no float64
                cases[name, estimator] = made, float("nan"), line_of(refusal)
    graphs = {key: steps.compiled(made) for key, (made, *_) in cases.items() if compile}
    steps.plain()
    timed = times(
        {
            "": steps.plain,
            **{key: step_of(steps, made) for key, (made, *_) in cases.items()},
            **{(key, "compiled"): step for key, (step, _) in graphs.items() if step is not None},
        },
        rounds,
    )
    plain = timed.pop("")
    flops = flops_of(steps.plain)
    net.zero_grad()
    base = flops, memory_of(steps.plain)
    for key, (made, error, unknown) in cases.items():
        step = step_of(steps, made)
        ratios = [a / b for a, b in zip(timed[key], plain, strict=True)]
        low, middle, high = quartiles(ratios)
        flops = flops_of(step) / base[0]
        net.zero_grad()  # what the step would free
        memory = memory_of(step) / base[1]
        compiled = float("nan")
        if (key, "compiled") in timed:
            pairs = zip(timed[key, "compiled"], plain, strict=True)
            compiled = statistics.median(a / b for a, b in pairs)
        obstacle = graphs[key][1] if compile else ""
        numbers = (middle, low, high, flops, memory, error)
        differs = bool(getattr(getattr(made, "estimator", None), "first_order", False))
        more: dict[str, Any] = {"obstacle": obstacle, "unknown": unknown, "differs": differs}
        rows[key] = Row(*key, *numbers, compiled=compiled, **more)
    net.zero_grad()
    order = [(n, e) for n, p in penalties.items() for e in variants(p)]
    return Benchmark(tuple(rows[key] for key in order), statistics.median(plain), within)


def line_of(error: Exception) -> str:
    """Return an error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def step_of(steps: Steps, penalty: Penalty) -> Callable[[], None]:
    """Return a step with a penalty, as a function."""
    return lambda: steps.penalised(penalty)


def error_of(steps: Steps, penalty: Penalty, made: Penalty) -> float:
    """Return the relative error of a penalty's gradient, against exact in float64."""
    exact = variants(penalty).get("exact")
    if exact is None:
        return float("nan")
    precise = steps.in_float64()
    squares, size, start = [], 0.0, exact.state_dict()
    for seed in range(SEEDS):
        for own in (exact, made):  # the same points and averages
            own.load_state_dict({**start, "seed": seed})
        true = precise.gradient(exact)
        squares.append(float((steps.gradient(made).double() - true).square().sum()))
        size += float(true.square().sum()) / SEEDS
    return (statistics.mean(squares) / size) ** 0.5 if size else float("nan")


def times(steps: Mapping[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    """Return the seconds of each step in each round; the steps of a round take turns."""
    found: dict[Any, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            finish()
            start = time.perf_counter()
            step()
            finish()
            found[key].append(time.perf_counter() - start)
    return found


def finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
