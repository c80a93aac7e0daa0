"""``python -m gpkit.report DIR``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table as RichTable

from gpkit.report.groups import tabulate
from gpkit.report.page import page
from gpkit.report.plots import draw
from gpkit.report.read import find
from gpkit.report.tables import Report, markdown, report_of, write_csv


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {message}; see python -m gpkit.report --help\n")


def main(words: Sequence[str] | None = None) -> None:
    """Write the report of some folders. Wrong input prints one line, and exits with code 1.

    Args:
        words: the command line; None is that of the process.
    """
    parser = Parser(prog="python -m gpkit.report", description=__doc__.partition(";")[0])
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="of a run or a sweep")
    parser.add_argument("--metric", help="to compare by, such as test/loss")
    parser.add_argument("--out", type=Path, help="the folder to write; DIR/report by default")
    parser.add_argument(
        "--baseline",
        nargs="+",
        metavar="KEY=VALUE",
        help="the options of the runs to compare with; penalty=none by default",
    )
    given = parser.parse_args(words)
    try:
        report = write_report(given.places, given.metric, given.baseline, given.out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    _say(report, given.out or given.places[0] / "report")


def write_report(
    places: Sequence[Path],
    metric: str | None = None,
    baseline: Sequence[str] | None = None,
    out: Path | None = None,
) -> Report:
    """Write the report of some runs: Markdown, HTML, CSV and PNG.

    Args:
        places: folders of runs and of sweeps.
        metric: to compare by; None is that which the runs optimised, or test/acc, or test/loss.
        baseline: ``key=value`` of the runs to compare with; None is those without a penalty.
        out: the folder to write; None is ``report`` in the first of the places.

    Returns:
        The report.

    Raises:
        ValueError: if there are no runs, or none has the metric or is the baseline.
    """
    found = find(places)
    if not found.runs:
        told = "; ".join(found.problems[:3])
        more = f"; and {len(found.problems) - 3} more" * (len(found.problems) > 3)
        raise ValueError(f"{places[0]}: no run is finished: {told}{more}")
    for text in baseline or []:
        if "=" not in text:
            raise ValueError(f"--baseline {text}: must be KEY=VALUE, as penalty=none")
    chosen = None if baseline is None else dict(t.partition("=")[::2] for t in baseline)
    table = tabulate(found.runs, metric, chosen)
    folder = out or places[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    report = report_of(places, found, table, draw(table, folder))
    (folder / "report.md").write_text(markdown(report, folder))
    (folder / "report.html").write_text(page(report))
    write_csv(table, folder)
    return report


def _say(report: Report, folder: Path) -> None:
    """Print the table, the problems, and where the files are."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    shown = RichTable(title=report.title, title_justify="left")
    for column in report.brief:
        shown.add_column(report.header[column])
    for row in report.rows:
        shown.add_row(*(row[column] for column in report.brief))
    console.print(shown)
    for sentence in (*report.summary, report.note, *report.problems):
        console.print(f"  {sentence}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"\n  report  {folder / 'report.html'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
