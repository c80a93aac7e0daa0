"""The table of results: to the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpkit.app.result import plain
from gpkit.report.groups import Spread
from gpkit.reproduce.row import Measured, Number

HEADER = ("result", "metric", "expected", "measured", "seeds", "seconds a run", "verdict")
STYLES = {"agrees": "green", "explained": "yellow", "differs": "red", "missing": "red"}


def show(found: Sequence[Measured], console: Console) -> None:
    """Print the table, the findings, and what is missing."""
    table = Table(title="Results", title_justify="left")
    for name in HEADER:
        table.add_column(name, overflow="fold")
    for cells in lines(found):
        style = STYLES.get(cells[-1], "")
        table.add_row(*cells[:-1], f"[{style}]{cells[-1]}[/]" if style else cells[-1])
    console.print(table)
    for text in (*findings(found), *(p for m in found for p in m.problems)):
        console.print(f"  {text}", soft_wrap=True, markup=False, highlight=False)


def lines(found: Sequence[Measured]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each number."""
    for measured in found:
        for number in measured.row.numbers:
            spread = measured.spread(number)
            yield (
                measured.row.name,
                number.metric + (", %" if number.scale == 100 else ""),
                "" if number.expected is None else figure(number.expected, number),
                "" if spread is None else described(spread, number),
                str(0 if spread is None else spread.n),
                f"{statistics.fmean(measured.seconds):.0f}" if measured.seconds else "",
                measured.verdict(number),
            )


def findings(found: Sequence[Measured]) -> list[str]:
    """Return a sentence for each number that differs for a known reason, each reason once."""
    reasons: dict[str, list[str]] = {}
    for measured in found:
        for number in measured.row.numbers:
            if measured.verdict(number) == "explained":
                reasons.setdefault(number.finding, []).append(measured.row.name)
    return [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in reasons.items()]


def described(spread: Spread, number: Number) -> str:
    """Return mean ± standard deviation, or of one seed the value."""
    mean = figure(spread.mean, number)
    return mean if math.isnan(spread.std) else f"{mean} ± {figure(spread.std, number)}"


def figure(value: float, number: Number) -> str:
    """Return a value, with one digit behind the point if it is in %.

    >>> figure(93.37, Number("test/acc", scale=100)), figure(2.64e-6, Number("dirac/distance"))
    ('93.4', '2.64e-06')
    """
    return f"{value:.1f}" if number.scale == 100 else f"{value:.4g}"


def markdown(found: Sequence[Measured]) -> str:
    """Return the table in Markdown, with the commands, and the findings."""
    names = (*HEADER, "date", "source", "command")
    rows = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    numbers = [m for m in found for _ in m.row.numbers]
    for measured, cells in zip(numbers, lines(found), strict=True):
        row = measured.row
        more = (measured.date, row.source, f"`{row.command}`")
        rows.append(f"| {' | '.join((*cells, *more))} |")
    told = [f"- {text}" for text in (*findings(found), *(p for m in found for p in m.problems))]
    return "\n".join([*rows, *([""] if told else []), *told]) + "\n"


def as_json(found: Sequence[Measured]) -> dict[str, Any]:
    """Return everything in plain values, by the names of the rows."""
    return plain(
        {
            m.row.name: {
                "command": m.row.command,
                "source": m.row.source,
                "date": m.date,
                "seconds": m.seconds,
                "problems": m.problems,
                "numbers": {
                    n.metric: {
                        "expected": n.expected,
                        "low": n.low,
                        "high": n.high,
                        "values": [n.scale * v for v in m.values.get(n.metric, [])],
                        "verdict": m.verdict(n),
                        "finding": n.finding,
                    }
                    for n in m.row.numbers
                },
            }
            for m in found
        }
    )


def write(found: Sequence[Measured], out: Path) -> None:
    """Write ``results.json`` and ``results.md``."""
    (out / "results.json").write_text(json.dumps(as_json(found), indent=2, allow_nan=False) + "\n")
    (out / "results.md").write_text(markdown(found))
