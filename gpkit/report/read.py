"""Find the runs below some folders, and what is missing."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpkit.app.jobs import SWEEP, missing, read_sweep
from gpkit.app.result import NAME, Result


@dataclass(frozen=True)
class Run:
    """A run: its folder and its result."""

    folder: Path
    result: Result


@dataclass
class Found:
    """What is in some folders.

    Args:
        runs: that are finished, each once.
        counts: the number of runs by how they ended.
        problems: a line for each run that is not finished, not there, or that cannot be read.
    """

    runs: list[Run] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def find(places: Sequence[Path]) -> Found:
    """Return the runs in folders: of a run, of a sweep, or of several.

    A run that is there twice, as the same options in two sweeps, counts once: the newest.

    Args:
        places: the folders.

    Raises:
        ValueError: if there is no such folder, or no run in it.
    """
    found, runs = Found(), []
    for place in places:
        if not place.is_dir():
            what = "a file, no folder" if place.exists() else "no such folder"
            raise ValueError(f"{place}: {what}; give the folder of a run or of a sweep")
        paths = sorted(place.rglob(NAME))
        for path in paths:
            try:
                result = Result.read(path.parent)
            except ValueError as error:
                found.counts["damaged"] += 1
                found.problems.append(str(error))
                continue
            assert result is not None
            runs.append(Run(path.parent, result))
        for path in sorted(place.rglob(SWEEP)):
            _note_missing(path.parent, [r for r in runs if r.folder.parent == path.parent], found)
        if not paths and not found.counts:
            older = "; a metrics.json of an older version is not enough" * any(
                place.rglob("metrics.json")
            )
            raise ValueError(
                f"{place}: no {NAME} in it or below{older}; give the folder of a run or of a sweep"
            )
    _sort(runs, found)
    return found


def _note_missing(place: Path, there: Sequence[Run], found: Found) -> None:
    """Note the jobs of a sweep that have left no result."""
    try:
        note = read_sweep(place)
    except ValueError as error:
        found.problems.append(str(error))
        return
    assert note is not None  # its file was found
    absent = missing(note, [r.result for r in there])
    found.counts.update(["missing"] * len(absent))
    for words, count in Counter(absent).items():
        of = f"{count} of {note['trials']} trials have" if words == "a trial" else f"{words} has"
        found.problems.append(f"{place}: {of} not run")


def _sort(runs: Sequence[Run], found: Found) -> None:
    """Keep the finished runs, each once, and note the others."""
    for run in sorted(runs, key=lambda r: r.result.started, reverse=True):
        state = run.result.state
        if state == "finished" and any(run.result.same(r.result) for r in found.runs):
            state = "twice"
        found.counts[state] += 1
        if state == "finished":
            found.runs.append(run)
        elif state not in ("same", "twice"):
            error = f": {run.result.error}" if run.result.error else ""
            found.problems.append(f"{run.folder} {_how(run.result)}{error}")
    found.runs.sort(key=lambda r: r.result.started)


def _how(result: Result) -> str:
    """Return how a run ended, in words."""
    words = {
        "failed": "failed",
        "killed": "was killed: its process is gone",
        "running": "is running",
        "interrupted": "was interrupted",
    }
    elsewhere = result.status == "running" and result.host != platform.node()
    return words[result.state] + f" on {result.host}, or was killed there" * elsewhere
