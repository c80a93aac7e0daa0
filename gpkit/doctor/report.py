"""Report: all findings about a net and its penalties, to read, to print and to store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from gpkit.finding import SEVERITIES, Finding


@dataclass(frozen=True)
class Report:
    """What the checks have found.

    Args:
        findings: the worst first.
        numbers: by the name of a penalty, what was measured: its value, the norms of gradients,
            the curve over weights, the cost in plain steps, and the parameters it reaches.
    """

    findings: tuple[Finding, ...]
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that would stop training or make a gradient wrong."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of the severity "error"."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def codes(self) -> frozenset[str]:
        """The codes of all findings."""
        return frozenset(f.code for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, for JSON; what is not finite is None."""
        made = {
            "ok": self.ok,
            "findings": [f.to_dict() for f in self.findings],
            "numbers": self.numbers,
        }
        return json.loads(json.dumps(made), parse_constant=lambda _: None)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table."""
        return [(f.severity, f.code, f.penalty, f.module, f.why, f.fix) for f in self.findings]

    def __str__(self) -> str:
        head = verdict(self.findings)
        if not self.findings:
            return head
        return f"{head}\n{rich_table(self) if find_spec('rich') else plain_table(self.rows())}"


def joined(reports: Sequence[Report]) -> Report:
    """Return several reports as one, the worst findings first."""
    found = [finding for report in reports for finding in report.findings]
    numbers = {name: own for report in reports for name, own in report.numbers.items()}
    return Report(tuple(sorted(found, key=lambda f: SEVERITIES.index(f.severity))), numbers)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the first line of a report."""
    counts = {s: sum(f.severity == s for f in findings) for s in SEVERITIES}
    told = [f"{n} {s}{'s' * (n != 1)}" for s, n in counts.items() if n]
    said = "this would not train" if counts["error"] else "nothing stops this training"
    return f"{said}: {', '.join(told) or 'no findings'}"


def plain_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as text, a line for the names and a line for the words of each finding."""
    lines = []
    for severity, code, penalty, module, why, fix in rows:
        where = ", ".join(filter(None, (penalty, module)))
        lines += [f"{severity:8}{code}{f' ({where})' if where else ''}", f"        {why}"]
        lines += [f"        -> {fix}"] * bool(fix)
    return "\n".join(lines)


def rich_table(report: Report, width: int | None = None) -> str:
    """Return the table as text, drawn by rich."""
    from rich.console import Console

    console = Console(width=width, no_color=True)
    with console.capture() as drawn:
        console.print(table(report))
    return drawn.get().rstrip()


def table(report: Report) -> Any:
    """Return the findings as a table of rich."""
    from rich.table import Table
    from rich.text import Text

    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    made = Table(show_lines=True)
    made.add_column("finding", no_wrap=True)
    made.add_column("where", overflow="fold", max_width=24)
    made.add_column("what it is, and what to do", overflow="fold", ratio=1)
    for severity, code, penalty, module, why, fix in report.rows():
        kind = Text(f"{code}\n{severity}", style=colours[severity])
        where = "\n".join(filter(None, (penalty, module)))
        made.add_row(kind, Text(where), Text(f"{why}\n-> {fix}" if fix else why))
    return made
