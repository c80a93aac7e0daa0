"""A benchmark as a table and as a chart."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table

from gpkit.bench.measure import Benchmark


def table(found: Benchmark) -> Table:
    """Return the rows as a table."""
    made = Table(title=f"in plain steps of {found.plain * 1e3:.3g} ms")
    for name in ("penalty", "estimator", "time", "quartiles", "operations", "memory", "error"):
        words = name in ("penalty", "estimator")
        made.add_column(name, justify="left" if words else "right", overflow="fold")
    for row in found.rows:
        if row.refused:
            made.add_row(row.penalty, row.estimator, "-", "", "", "", row.refused)
            continue
        numbers = (number(row.flops), number(row.memory), f"{row.error:.1e}")
        between = f"{row.low:.2f}-{row.high:.2f}"
        made.add_row(row.penalty, row.estimator, number(row.time), between, *numbers)
    return made


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
    axes.barh([p + 0.2 for p in places], [r.time for r in rows], 0.4, xerr=spread, label="time")
    axes.barh([p - 0.2 for p in places], [r.flops for r in rows], 0.4, label="operations")
    axes.axvline(1, color="gray", linestyle=":")
    axes.set_yticks(list(places), [f"{r.penalty}, {r.estimator}" for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel("plain steps")
    axes.legend()
    figure.savefig(path, dpi=120)
