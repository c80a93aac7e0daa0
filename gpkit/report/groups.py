"""Runs that differ in the seed alone, their means, and paired tests against the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from gpkit import checks
from gpkit.app.result import (
    SHOWN,
    Result,
    flattened,
    is_baseline,
    larger_is_better,
    main_metric,
)
from gpkit.report.read import Run

COST = "cost_in_plain_steps"
LEFT_OUT = (*SHOWN, "seed", "ckpt_path", "task")  # options that do not define a group


@dataclass(frozen=True)
class Spread:
    """The mean and the standard deviation (with n - 1) of n numbers; of one number it is NaN.

    >>> Spread.of([1.0, 3.0])
    Spread(mean=2.0, std=1.4142135623730951, n=2)
    """

    mean: float
    std: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return those of some numbers, at least one."""
        std = statistics.stdev(values) if len(values) > 1 else math.nan
        return Spread(statistics.fmean(values), std, len(values))


@dataclass(frozen=True)
class Comparison:
    """A group against the baseline, over the seeds that both have.

    Args:
        gain: of the differences, group - baseline.
        p: of the two-sided paired t-test; NaN for fewer than two pairs, or equal differences.
        holm: p, corrected for the number of groups that are compared (Holm 1979).
    """

    gain: Spread
    p: float
    holm: float = math.nan


@dataclass
class Group:
    """The runs that differ in the seed alone.

    Args:
        values: what was varied, with the values of this group; None where it has no such option.
        runs: by seed.
        is_baseline: whether others are compared with it.
        against: the comparison with the baseline, for the metric of the report.
    """

    values: dict[str, Any]
    runs: dict[Any, Run] = field(default_factory=dict)
    is_baseline: bool = False
    against: Comparison | None = None

    def by_seed(self, metric: str) -> dict[Any, float]:
        """Return the values of a metric by seed, of the runs that have it."""
        found = {seed: value_of(run.result, metric) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def spread(self, metric: str) -> Spread | None:
        """Return the mean and the standard deviation of a metric; None if no run has it."""
        values = list(self.by_seed(metric).values())
        return Spread.of(values) if values else None

    @property
    def name(self) -> str:
        """The values in words."""
        words = [f"{k.removeprefix('penalty.')}={word(v)}" for k, v in self.values.items()]
        named = [
            w.removeprefix("penalty=")
            for w, v in zip(words, self.values.values(), strict=True)
            if v is not None
        ]
        return " ".join(named) or "all runs"


@dataclass
class Table:
    """All groups, and what they are compared by.

    Args:
        groups: the baseline first, the others in the order of the runs.
        keys: what was varied.
        metric: the one that groups are compared by.
        metrics: all of them, that one first.
    """

    groups: list[Group]
    keys: list[str]
    metric: str
    metrics: list[str]


def word(value: Any) -> str:
    """Return a value of an option in words; None is a dash."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def value_of(result: Result, metric: str) -> float | None:
    """Return a metric of a run, its wall time, or its cost."""
    own = {"seconds": result.seconds, COST: result.cost_in_plain_steps}
    return own[metric] if metric in own else result.metrics.get(metric)


def tabulate(
    runs: Sequence[Run], metric: str | None = None, baseline: Mapping[str, str] | None = None
) -> Table:
    """Return the groups of some runs, compared with the baseline.

    Args:
        runs: that are finished.
        metric: to compare by; None is the first that there is of the metric that the runs
            optimised, the accuracy and the loss of the test.
        baseline: options that the baseline has, as words; None is no penalty. Options that do not
            belong to the penalty must be those of the group.

    Raises:
        ValueError: if no run has the metric, or no group the options of the baseline.
    """
    names = sorted({name for run in runs for name in run.result.metrics})
    chosen = metric or main_metric([run.result for run in runs])
    if chosen is None:
        raise ValueError("no run has a metric: nothing to compare")
    checks.choice("--metric", chosen, names)
    keys = varied_keys([run.result for run in runs])
    made: dict[tuple[str, ...], Group] = {}
    for run in runs:
        values = {key: option(run.result, key) for key in keys}
        group = made.setdefault(tuple(map(repr, values.values())), Group(values))
        seed = run.result.config.get("seed")
        group.runs[seed if seed not in group.runs else (seed, str(run.folder))] = run
    groups = list(made.values())
    _compare(groups, chosen, baseline)
    groups.sort(key=lambda group: not group.is_baseline)
    return Table(groups, keys, chosen, [chosen, *(n for n in names if n != chosen)])


def varied_keys(results: Sequence[Result]) -> list[str]:
    """Return what differs between runs: names of groups of files, and options.

    An option counts if it differs between runs that chose the same files, or if it was typed: the
    files themselves differ in many options. The seed does not count.
    """
    typed = dict.fromkeys(key for r in results for key in r.varied)
    names = dict.fromkeys(key for r in results for key in r.choices)
    differing = [k for k in names if len({repr(option(r, k)) for r in results}) > 1]
    alike: dict[str, list[Result]] = {}
    for r in results:
        alike.setdefault(repr([option(r, k) for k in differing]), []).append(r)
    leaves: dict[str, None] = {}
    for same in alike.values():
        flat = [flattened(r.config) for r in same]
        for key in dict.fromkeys(k for each in flat for k in each):
            if len({repr(each.get(key)) for each in flat}) > 1 and not key.endswith("seed"):
                leaves[key] = None
    several = [k for k in typed if len({repr(option(r, k)) for r in results}) > 1]
    below = [k for k in leaves if not any(k.startswith(f"{t}.") for t in several)]
    order = [*several, *differing, *below] if len(results) > 1 else [*typed]
    return [k for k in dict.fromkeys(order) if k.partition(".")[0] not in LEFT_OUT]


def option(result: Result, key: str) -> Any:
    """Return what a run has for an option or a group of files; None if it has no such option."""
    if is_baseline(result.config) and key.startswith("penalty."):
        return None
    if key in result.choices:
        return result.varied.get(key, result.choices[key])
    found: Any = result.config
    for part in key.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(part)
    return found


def _compare(groups: Sequence[Group], metric: str, baseline: Mapping[str, str] | None) -> None:
    """Compare each group with its baseline, which has the same options outside of the penalty."""
    if baseline is not None:
        for group in groups:
            group.is_baseline = all(word(group.values.get(k)) == v for k, v in baseline.items())
        if not any(group.is_baseline for group in groups):
            asked = " ".join(f"{k}={v}" for k, v in baseline.items())
            named = "; ".join(g.name for g in groups)
            raise ValueError(f"--baseline {asked}: no group has this; there are {named}")
    else:
        for group in groups:
            group.is_baseline = is_baseline(next(iter(group.runs.values())).result.config)
    own = {*(baseline or {}), "penalty"}
    rest = {id(g): {k: v for k, v in g.values.items() if not _belongs(k, own)} for g in groups}
    for group in groups:
        others = [g for g in groups if g.is_baseline and rest[id(g)] == rest[id(group)]]
        if not group.is_baseline and len(others) == 1:
            group.against = paired(group.by_seed(metric), others[0].by_seed(metric))
    compared = [g for g in groups if g.against is not None and not math.isnan(g.against.p)]
    corrected = holm([g.against.p for g in compared if g.against is not None])
    for group, p in zip(compared, corrected, strict=True):
        assert group.against is not None
        group.against = Comparison(group.against.gain, group.against.p, p)


def _belongs(key: str, own: set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in own)


def paired(values: Mapping[Any, float], others: Mapping[Any, float]) -> Comparison | None:
    """Return the comparison of two groups over the seeds that both have; None without any.

    Args:
        values: of a metric by seed.
        others: of the baseline.
    """
    seeds = [seed for seed in values if seed in others]
    if not seeds:
        return None
    gain = Spread.of([values[seed] - others[seed] for seed in seeds])
    if len(seeds) < 2 or gain.std <= 1e-12 * abs(gain.mean) or gain.std == 0:
        return Comparison(gain, math.nan)
    test = stats.ttest_rel([values[s] for s in seeds], [others[s] for s in seeds])
    return Comparison(gain, float(test.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Return p values that are corrected for their number, as Holm (1979) does.

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than the one before.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        corrected[i] = largest
    return corrected


def best_group(table: Table) -> Group:
    """Return the group with the best mean of the metric."""
    sign = 1 if larger_is_better(table.metric) else -1
    spreads = [(g, s) for g in table.groups if (s := g.spread(table.metric)) is not None]
    return max(spreads, key=lambda pair: sign * pair[1].mean)[0]
