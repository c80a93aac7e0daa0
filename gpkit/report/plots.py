"""The plots of a report, each a PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpkit.app.result import larger_is_better
from gpkit.report.curves import Curve, curves_of, mean_curve
from gpkit.report.groups import COST, Group, Spread, Table, word

WEIGHT = "penalty.weight"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
GREY = "#888888"
MOST = 8  # curves in a plot


def draw(table: Table, folder: Path) -> dict[str, Path]:
    """Draw the plots that the runs have the numbers for.

    Args:
        table: the groups.
        folder: to write into.

    Returns:
        The files by their titles.
    """
    plots: dict[str, tuple[str, Callable[[Table], Figure | None]]] = {
        f"{table.metric} against the weight": ("metric_against_weight", against_weight),
        f"{table.metric} against gradient norms": ("metric_against_norm", against_norm),
        "Learning curves": ("learning_curves", learning_curves),
        "Difference to the baseline against cost": ("gain_against_cost", gain_against_cost),
    }
    written = {}
    for title, (name, plot) in plots.items():
        figure = plot(table)
        if figure is not None:
            written[title] = folder / f"{name}.png"
            figure.savefig(written[title], dpi=150, bbox_inches="tight")
    return written


def series(table: Table) -> dict[str, list[Group]]:
    """Return the groups that differ in the weight alone, by their names; no baseline."""
    lines: dict[str, list[Group]] = {}
    for group in table.groups:
        if not group.is_baseline:
            rest = {k: v for k, v in group.values.items() if k != WEIGHT}
            lines.setdefault(Group(rest).name, []).append(group)
    return lines


def against_weight(table: Table) -> Figure | None:
    """Return the metric against the weight: a line for each penalty, with error bars."""
    lines = {}
    for name, groups in series(table).items():
        points = [
            (float(weight), spread)
            for group in groups
            if isinstance(weight := group.values.get(WEIGHT), (int, float))
            and (spread := group.spread(table.metric)) is not None
        ]
        if len(points) > 1:
            lines[name] = sorted(points, key=lambda point: point[0])
    if not lines:
        return None
    figure, (axes,) = _figure(1)
    for (name, points), color in zip(lines.items(), _colors(), strict=False):
        _bars(axes, [w for w, _ in points], [spread for _, spread in points], name, color)
    weights = sorted({weight for points in lines.values() for weight, _ in points})
    if weights[0] > 0:
        axes.set_xscale("log")
        axes.set_xticks(weights, [word(w) for w in weights])
        axes.minorticks_off()
    for group in (g for g in table.groups if g.is_baseline):
        _level(axes, group, table.metric)
    axes.set(xlabel=WEIGHT, ylabel=table.metric)
    _legend(axes)
    return figure


def against_norm(table: Table) -> Figure | None:
    """Return the metric of each run against its gradient norms."""
    stage = table.metric.partition("/")[0]
    norms = [f"{stage}/grad_norm/{where}" for where in ("weight", "input")]
    norms = [n for n in norms if n in table.metrics and n != table.metric]
    if not norms:
        return None
    figure, panels = _figure(len(norms))
    lines = {**{g.name: [g] for g in table.groups if g.is_baseline}, **series(table)}
    colors = _group_colors([groups[0] for groups in lines.values()])
    for axes, norm in zip(panels, norms, strict=True):
        seen: list[float] = []
        for (name, groups), color in zip(lines.items(), colors, strict=True):
            points = [
                (x, y)
                for group in groups
                for seed, x in group.by_seed(norm).items()
                if (y := group.by_seed(table.metric).get(seed)) is not None
            ]
            if points:
                own, values = zip(*points, strict=True)
                axes.scatter(own, values, s=28, alpha=0.75, color=color, label=name)
                seen += own
        axes.set(xlabel=norm, ylabel=table.metric)
        _scale(axes, "x", seen)
    _legend(panels[0])
    return figure


def learning_curves(table: Table) -> Figure | None:
    """Return the training loss and the metric at validation, step by step: means over seeds."""
    chosen = most_telling(table)
    curves = {g.name: [curves_of(run.folder) for run in g.runs.values()] for g in chosen}
    tags = {tag for each in curves.values() for run in each for tag in run}
    at_validation = f"val/{table.metric.partition('/')[2]}"
    wanted = ["train/loss", "train/critic_loss", at_validation, "grad_norm/weight"]
    shown = [tag for tag in dict.fromkeys(wanted) if tag in tags]
    if not shown:
        return None
    figure, panels = _figure(len(shown))
    for axes, tag in zip(panels, shown, strict=True):
        seen: list[float] = []
        for group, color in zip(chosen, _group_colors(chosen), strict=True):
            own: list[Curve] = [run[tag] for run in curves[group.name] if tag in run]
            if own:
                (steps, mean), std = mean_curve(own)
                axes.plot(steps, mean, color=color, label=f"{group.name} (n {len(own)})", lw=1.2)
                axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.15, lw=0)
                seen += mean.tolist()
        axes.set(xlabel="step", ylabel=tag)
        _scale(axes, "y", seen)
    _legend(panels[0])
    return figure


def gain_against_cost(table: Table) -> Figure | None:
    """Return what each group gains over the baseline, against the cost of its steps."""
    points = [
        (group, cost, group.against.gain)
        for group in table.groups
        if group.against is not None and (cost := group.spread(COST)) is not None
    ]
    if not points:
        return None
    figure, (axes,) = _figure(1)
    colors = dict(zip(series(table), _colors(), strict=False))
    for name, groups in series(table).items():
        own = [(cost, gain, g) for g, cost, gain in points if g in groups]
        for i, (cost, gain, group) in enumerate(own):
            label = name if i == 0 else None
            x, color = cost.mean, colors.get(name, GREY)
            error = None if math.isnan(gain.std) else gain.std
            wide = None if math.isnan(cost.std) else cost.std
            axes.errorbar(x, gain.mean, error, wide, fmt="o", color=color, label=label, capsize=3)
            if len(own) > 1 and group.values.get(WEIGHT) is not None:
                text = f"λ {word(group.values[WEIGHT])}"
                axes.annotate(text, (x, gain.mean), (5, 5), textcoords="offset points", size=8)
    axes.axhline(0, color=GREY, lw=1, ls="--")
    better = "more" if larger_is_better(table.metric) else "less"
    axes.set(
        xlabel="time of a step, in steps without a penalty",
        ylabel=f"difference in {table.metric} ({better} is better)",
    )
    _legend(axes)
    return figure


def most_telling(table: Table) -> list[Group]:
    """Return the groups to draw curves of: all, or if they are many the best of each penalty."""
    if len(table.groups) <= MOST:
        return table.groups
    sign = 1 if larger_is_better(table.metric) else -1

    def score(group: Group) -> float:
        spread = group.spread(table.metric)
        return -math.inf if spread is None else sign * spread.mean

    lines = [[g] for g in table.groups if g.is_baseline] + list(series(table).values())
    return sorted([max(own, key=score) for own in lines], key=score, reverse=True)[:MOST]


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(1 + 4.6 * panels, 3.8), layout="constrained")
    made = figure.subplots(1, panels, squeeze=False)[0]
    for axes in made:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(made)


def _scale(axes: Axes, name: Literal["x", "y"], seen: Sequence[float]) -> None:
    """Make an axis logarithmic if its values are positive and span more than a factor of ten."""
    if seen and 0 < 10 * min(seen) < max(seen):
        axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
        axes.set(**{f"{name}scale": "log"})
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter(_plain)
        axes.tick_params(which="minor", labelsize=7)


def _plain(value: float, _: float) -> str:
    return f"{value:g}"


def _colors() -> Iterator[str]:
    while True:
        yield from COLORS


def _group_colors(groups: Sequence[Group]) -> list[str]:
    colors = _colors()
    return [GREY if group.is_baseline else next(colors) for group in groups]


def _bars(axes: Axes, x: Sequence[float], spreads: Sequence[Spread], name: str, color: str) -> None:
    bars = [0.0 if math.isnan(s.std) else s.std for s in spreads]
    means, fewest = [s.mean for s in spreads], min(s.n for s in spreads)
    options: dict[str, Any] = {"fmt": "o-", "capsize": 3, "lw": 1.5, "ms": 5}
    axes.errorbar(x, means, bars, color=color, label=f"{name} (n {fewest})", **options)


def _level(axes: Axes, group: Group, metric: str) -> None:
    spread = group.spread(metric)
    if spread is not None:
        axes.axhline(spread.mean, color=GREY, ls="--", label=f"{group.name} (n {spread.n})")
        if not math.isnan(spread.std):
            low, high = spread.mean - spread.std, spread.mean + spread.std
            axes.axhspan(low, high, color=GREY, alpha=0.15, lw=0)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)
