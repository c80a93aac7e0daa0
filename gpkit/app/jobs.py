"""The jobs of a sweep: which there should be, and what they have left. Needs no Hydra."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpkit.app.result import NAME, Result

SWEEP = "sweep.json"


def jobs_of(swept: Mapping[str, Sequence[str] | None]) -> list[dict[str, str]] | None:
    """Return what each job of a sweep sets; None if a search chooses it.

    >>> jobs_of({"penalty": ["none", "r1"], "seed": ["0"]})
    [{'penalty': 'none', 'seed': '0'}, {'penalty': 'r1', 'seed': '0'}]
    """
    lists = list(swept.values())
    if any(each is None for each in lists):
        return None
    product = itertools.product(*(each for each in lists if each is not None))
    return [dict(zip(swept, each, strict=True)) for each in product]


def read_sweep(place: Path) -> dict[str, Any] | None:
    """Return what ``sweep.json`` says of a sweep; None without it.

    Returns:
        Its options as ``overrides``, the values of what it varies as ``swept``, and the number of
        the jobs of a search as ``trials``.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        found = json.loads((place / SWEEP).read_text())
        trials = found.get("trials")
        return {
            "overrides": list(found["overrides"]),
            "swept": dict(found["swept"]),
            "trials": None if trials is None else int(trials),
        }
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{place / SWEEP} does not describe a sweep: {error}") from error


def missing(note: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    """Return the jobs of a sweep that have left no result, in words.

    A search chooses what its jobs are, so their number is all that is known of them: each is
    "a trial".

    Args:
        note: what ``sweep.json`` says.
        results: of the sweep.
    """
    jobs = jobs_of(note["swept"])
    if jobs is None:
        return ["a trial"] * max(0, (note["trials"] or 0) - len(results))
    done = [r.options(note["swept"]) for r in results]
    return [" ".join(f"{k}={v}" for k, v in job.items()) for job in jobs if job not in done]


def results_in(place: Path) -> dict[str, Result]:
    """Return the results of the jobs of a sweep, by the name of their folder, in order.

    A job that is the same as another one has the metrics of that one.
    """

    def order(path: Path) -> tuple[int, str]:
        number = path.name.partition("-")[0]
        return (int(number) if number.isdigit() else sys.maxsize, path.name)

    folders = sorted((path.parent for path in place.glob(f"*/{NAME}")), key=order)
    found = {path.name: r for path in folders if (r := Result.read(path)) is not None}
    for r in found.values():
        if r.same_as in found:
            r.metrics = found[r.same_as].metrics
    return found
