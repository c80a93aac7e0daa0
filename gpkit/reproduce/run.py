"""Make the runs of rows, each row a sweep over seeds, and read what they give."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from gpkit.report.groups import value_of
from gpkit.report.read import find
from gpkit.reproduce.row import Measured, Row

QUIET = ("device=cpu", "trainer.enable_progress_bar=false")
LOG = "log.txt"


def reproduce(
    rows: Sequence[Row],
    out: Path,
    seeds: int | None = None,
    jobs: int = 2,
    tell: Callable[[Measured, int], None] = lambda measured, left: None,
) -> list[Measured]:
    """Run some rows, the longest first.

    A run that is finished in the folder is not made again.

    Args:
        rows: to run.
        out: the folder of the runs, one below it for each row.
        seeds: how many seeds, from 0 on; None is each row's own number.
        jobs: how many rows run at the same time, each on one core.
        tell: is called after each row, with the number of those that are left.

    Returns:
        What they give, in the order of the rows.
    """
    order = sorted(rows, key=lambda row: -row.seconds * row.seeds)
    done: dict[str, Measured] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, row, out / row.name, seeds or row.seeds) for row in order]
        try:
            for future in as_completed(futures):
                measured = future.result()
                done[measured.row.name] = measured
                tell(measured, len(rows) - len(done))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[row.name] for row in rows]


def run(row: Row, folder: Path, seeds: int) -> Measured:
    """Make the runs of a row in a process of its own, and return what they give."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"seed={','.join(map(str, range(seeds)))}", f"hydra.sweep.dir={folder}"]
    if row.program == "gpkit":
        words = ["-m", *row.overrides, *QUIET, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (folder / LOG).open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", row.program, *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            check=False,
        )
    return read(row, folder, seeds, done.returncode)


def read(row: Row, folder: Path, seeds: int, code: int = 0) -> Measured:
    """Return what the runs in a folder give.

    Args:
        row: the row.
        folder: of its sweep.
        seeds: how many seeds count.
        code: the exit code of the sweep.
    """
    measured = Measured(row)
    try:
        found = find([folder])
    except ValueError as error:
        measured.problems.append(f"{error}; see {folder / LOG}")
        return measured
    runs = {r.result.config["seed"]: r.result for r in found.runs}
    runs = {seed: runs[seed] for seed in range(seeds) if seed in runs}
    if len(runs) < seeds:
        measured.problems += found.problems or [f"{folder}: {len(runs)} of {seeds} runs"]
    elif code:
        measured.problems.append(f"{folder / LOG}: the sweep ended with exit code {code}")
    for number in row.numbers:
        values = {seed: value_of(result, number.metric) for seed, result in runs.items()}
        measured.values[number.metric] = [v for v in values.values() if v is not None]
        absent = [seed for seed, v in values.items() if v is None]
        if absent:
            measured.problems.append(f"{folder}: no {number.metric} of seeds {absent}")
    measured.seconds = [r.seconds for r in runs.values() if r.seconds is not None]
    measured.date = max((r.started for r in runs.values()), default="")[:10]
    return measured
