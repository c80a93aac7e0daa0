"""``python -m gpkit.reproduce``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gpkit.report.__main__ import Parser
from gpkit.reproduce.row import Measured, Row
from gpkit.reproduce.rows import chosen
from gpkit.reproduce.run import reproduce
from gpkit.reproduce.shown import show, write

EPILOG = (
    "Exit codes: 0, every number agrees with its source, or a finding says why not; "
    "1, a number differs; 2, a run is missing, or the command is wrong."
)


def main(words: Sequence[str] | None = None, rows: Sequence[Row] | None = None) -> int:
    """Run the results again, print and write the table.

    Args:
        words: the command line; None is that of the process.
        rows: to choose from; None are all of `gpkit.reproduce.rows`.

    Returns:
        The exit code.
    """
    parser = Parser(
        prog="python -m gpkit.reproduce",
        description="Run the results of docs/results.md again, and compare them.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="results or rows, as orders or gans/25_wgan_gp"
    )
    parser.add_argument("--seeds", type=positive, help="of each row, instead of its own number")
    parser.add_argument("--jobs", type=positive, default=2, help="rows at the same time; 2")
    parser.add_argument(
        "--out", type=Path, default=Path("reproduced"), help="the folder to write; reproduced"
    )
    given = parser.parse_args(words)
    try:
        asked = chosen(given.only) if rows is None else list(rows)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 140)
    out, start = given.out.absolute(), time.perf_counter()

    def tell(measured: Measured, left: int) -> None:
        verdicts = {measured.verdict(number) for number in measured.row.numbers}
        name = measured.row.name
        console.print(f"  {name}: {', '.join(sorted(verdicts))}; {left} to go", highlight=False)

    found = reproduce(asked, out / "runs", given.seeds, given.jobs, tell)
    write(found, out)
    show(found, console)
    console.print(f"\n  {(time.perf_counter() - start) / 60:.1f} minutes", highlight=False)
    console.print(f"  {out / 'results.md'}", soft_wrap=True, highlight=False)
    return exit_code(found)


def exit_code(found: Sequence[Measured]) -> int:
    """Return 2 if a run is missing, 1 if a number differs, else 0."""
    verdicts = {m.verdict(n) for m in found for n in m.row.numbers}
    return 2 if "missing" in verdicts else int("differs" in verdicts)


def positive(text: str) -> int:
    """Return an integer >= 1.

    Raises:
        ArgumentTypeError: if it is none.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1; got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
