"""A benchmark as tables and as a chart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from gpkit.bench.measure import Benchmark, Row


def tables(found: Benchmark) -> Iterator[Table]:
    """Yield a table for each penalty."""
    for name in dict.fromkeys(row.penalty for row in found.rows):
        title = f"{name}, in plain steps of {found.plain * 1e3:.3g} ms"
        made = Table(title=title, box=SIMPLE, pad_edge=False)
        made.add_column("estimator", no_wrap=True)
        for column in COLUMNS:
            made.add_column(column, justify="right", no_wrap=True)
        for row in found.rows:
            if row.penalty == name:
                made.add_row(row.estimator, *cells(row))
        yield made


COLUMNS = ("time", "quartiles", "compiled", "flops", "memory", "error")


def notes(found: Benchmark) -> list[str]:
    """Return why rows were not measured, or not compiled, a line each."""
    lines = []
    for row in found.rows:
        unknown = row.unknown and f"its error is not known: {row.unknown}"
        obstacle = row.obstacle and f"not compiled: {row.obstacle}"
        whys = filter(None, (row.refused, unknown, obstacle))
        lines += [f"{row.penalty}, {row.estimator}: {why}" for why in whys]
    return lines


def cells(row: Row) -> list[str]:
    """Return the numbers of a row in words."""
    if row.refused:
        return ["-"] * len(COLUMNS)
    between = f"{row.low:.2f}-{row.high:.2f}"
    costs = number(row.compiled), number(row.flops), number(row.memory)
    error = f"{row.error:.1e}" if math.isfinite(row.error) else "-"
    return [number(row.time), between, *costs, error]


def number(value: float) -> str:
    """Return a ratio with two decimals; "-" if it is not known."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def chart(found: Benchmark, path: Path) -> None:
    """Write a bar chart of the times and operations to a PNG file."""
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if not row.refused]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    spread = [[r.time - r.low for r in rows], [r.high - r.time for r in rows]]
    bars = {"time": [r.time for r in rows], "compiled": [r.compiled for r in rows]}
    bars = {name: own for name, own in bars.items() if any(map(math.isfinite, own))}
    bars["operations"] = [r.flops for r in rows]
    width = 0.8 / len(bars)
    for i, (name, own) in enumerate(bars.items()):
        heights = [p - 0.4 + (i + 0.5) * width for p in places]
        axes.barh(heights, own, width, xerr=spread if name == "time" else None, label=name)
    axes.axvline(1, color="gray", linestyle=":")
    axes.set_yticks(list(places), [f"{r.penalty}, {r.estimator}" for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel("plain steps")
    axes.legend()
    figure.savefig(path, dpi=120)
