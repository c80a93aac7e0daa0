"""The report in words: rows, Markdown, and CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpkit.app.result import larger_is_better
from gpkit.report.groups import COST, Group, Spread, Table, best_group, option, value_of, word
from gpkit.report.read import Found

SHOWN = 4  # metrics in the table of the report; the CSV files have all
NOTE = (
    "n is the number of seeds, ± the standard deviation over them (n - 1). The difference is that "
    "to {baseline}, seed by seed; p is of a two-sided paired t-test, and corrected for {tests} "
    "comparison{s} (Holm)."
)


@dataclass
class Report:
    """A report, in the order in which it is read.

    Args:
        title: the folders.
        summary: sentences about the runs.
        header: of the table of groups.
        rows: of the table of groups, in words.
        brief: the columns that fit into a terminal.
        note: what the table means.
        problems: what is missing, failed or killed.
        plots: the files of the plots, by their titles.
    """

    title: str
    summary: list[str]
    header: list[str]
    rows: list[list[str]]
    brief: list[int]
    note: str
    problems: list[str]
    plots: dict[str, Path]


def report_of(places: Sequence[Path], found: Found, table: Table, plots: dict[str, Path]) -> Report:
    """Return the report of some runs.

    Args:
        places: the folders that it is about.
        found: what is in them.
        table: the groups of the finished runs.
        plots: the files of the plots, by their titles.
    """
    best = best_group(table)
    spread = best.spread(table.metric)
    assert spread is not None
    counts = ", ".join(f"{count} {WORDS.get(k, k)}" for k, count in sorted(found.counts.items()))
    better = "largest" if larger_is_better(table.metric) else "smallest"
    summary = [
        f"Runs: {counts}.",
        f"The {better} {table.metric} has {best.name}: {in_words(spread)} (n {spread.n}).",
    ]
    if not plots:
        summary.append("There are no plots: the runs have too few numbers in common.")
    metrics = main_metrics(table)
    compared = any(group.against for group in table.groups)
    names = [m.replace("_", " ") if m == COST else m for m in metrics]
    against = ["difference", "p", "p (Holm)"] if compared else []
    header = [*table.keys, "n", names[0], *against, *names[1:]]
    long = {"p", "seconds", *(m for m in metrics if m not in (table.metric, COST))}
    brief = [i for i, name in enumerate(header) if name not in long]
    rows = [_row(group, table, metrics, compared=compared) for group in table.groups]
    tests = sum(g.against is not None and not math.isnan(g.against.p) for g in table.groups)
    named = {g.name for g in table.groups if g.is_baseline}
    baseline = named.pop() if len(named) == 1 else "the baseline with the same other options"
    note = NOTE.format(baseline=baseline, tests=tests, s="s" * (tests != 1))
    if not compared:
        note = note.partition(" The difference")[0] + " There is no baseline among the runs."
    title = ", ".join(map(str, places))
    return Report(title, summary, header, rows, brief, note, found.problems, plots)


WORDS = {
    "same": "the same as another",
    "twice": "there twice",
    "failed": "failed",
    "running": "still running",
}


def main_metrics(table: Table) -> list[str]:
    """Return the metrics of the table of the report: the main one first, then the cost."""
    order = [table.metric, "test/acc", "test/loss", "test/grad_norm/weight", "test/grad_norm/input"]
    order += [m for m in table.metrics if m.startswith(("test/", "modes/", "wasserstein/"))]
    shown = [m for m in dict.fromkeys(order) if m in table.metrics][:SHOWN]
    costs = [m for m in (COST, "seconds") if any(g.spread(m) for g in table.groups)]
    return [shown[0], *costs, *shown[1:]]


def in_words(spread: Spread | None) -> str:
    """Return a mean and its standard deviation.

    >>> in_words(Spread(0.9385, 0.006, 3)), in_words(Spread(12345.6, math.nan, 1))
    ('0.9385 ± 0.0060', '12346')
    """
    if spread is None:
        return ""
    size = max(abs(spread.mean), 0.0 if math.isnan(spread.std) else spread.std)
    digits = max(0, 3 - math.floor(math.log10(size))) if size > 0 else 4
    if size > 0 and digits > 7:
        return f"{spread.mean:.3g}" + ("" if math.isnan(spread.std) else f" ± {spread.std:.2g}")
    std = "" if math.isnan(spread.std) else f" ± {spread.std:.{digits}f}"
    return f"{spread.mean:.{digits}f}{std}"


def _row(group: Group, table: Table, metrics: Sequence[str], *, compared: bool) -> list[str]:
    own = group.spread(table.metric)
    first, *rest = [in_words(group.spread(metric)) for metric in metrics]
    against = _against(group, own) if compared else []
    return [*map(word, group.values.values()), str(own.n if own else 0), first, *against, *rest]


def _against(group: Group, own: Spread | None) -> list[str]:
    """Return the cells of the comparison with the baseline."""
    against = group.against
    if against is None:
        return ["baseline" if group.is_baseline else "", "", ""]
    gain = in_words(against.gain)
    gain = gain if gain.startswith("-") else f"+{gain}"
    pairs = f" (n {against.gain.n})" if own is None or against.gain.n != own.n else ""
    return [gain + pairs, _p(against.p), _p(against.holm)]


def _p(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


def markdown(report: Report, folder: Path) -> str:
    """Return a report as Markdown, with links to the plots that are relative to its folder."""
    lines = [f"# {report.title}", "", *_spaced(report.summary)]
    lines += _table(report.header, report.rows)
    lines += ["", report.note, ""]
    for title, path in report.plots.items():
        lines += [f"![{title}]({path.relative_to(folder)})", ""]
    if report.problems:
        lines += ["## Missing, failed or killed", ""]
        lines += [f"- {line}" for line in report.problems]
        lines += [""]
    return "\n".join(lines)


def _spaced(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in (sentence, "")]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, rows)]


def write_csv(table: Table, folder: Path) -> list[Path]:
    """Write ``runs.csv``, a line for each run, and ``groups.csv``, one for each group.

    Args:
        table: the groups.
        folder: to write into.

    Returns:
        The files.
    """
    names = [*table.metrics, COST, "seconds"]
    paths = [folder / "runs.csv", folder / "groups.csv"]
    with paths[0].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*table.keys, "seed", *names, "parameters", "folder"])
        for group in table.groups:
            for run in group.runs.values():
                own = [option(run.result, key) for key in [*table.keys, "seed"]]
                own += [value_of(run.result, name) for name in names]
                writer.writerow([*own, run.result.parameters, run.folder])
    with paths[1].open("w", newline="") as file:
        writer = csv.writer(file)
        parts = ("mean", "std", "n")
        compared = ("difference", "difference std", "pairs", "p", "p (Holm)")
        writer.writerow([*table.keys, *(f"{n} {part}" for n in names for part in parts), *compared])
        for group in table.groups:
            cells: list[object] = list(group.values.values())
            for spread in map(group.spread, names):
                cells += ["", "", 0] if spread is None else [*map(_finite, _parts(spread))]
            if group.against is not None:
                found = [*_parts(group.against.gain), group.against.p, group.against.holm]
                cells += map(_finite, found)
            writer.writerow(cells)
    return paths


def _parts(spread: Spread) -> tuple[float, float, int]:
    return spread.mean, spread.std, spread.n


def _finite(value: float) -> float | str:
    return "" if math.isnan(value) else value
