"""A sweep: what it varies, which of its jobs are done, and what it says at its end."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console
from rich.table import Table

from gpkit.app.jobs import SWEEP, jobs_of, missing, read_sweep, results_in
from gpkit.app.overrides import is_group, parse
from gpkit.app.result import LAST, Result, best, is_baseline, main_metric, write_json


class NoteSweep(Callback):
    """Notes, before the jobs of a sweep start, what it varies: their folders are named by it.

    Attributes:
        folder: of the sweep that this process launches.
    """

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Write ``sweep.json``, and leave out of the folders' names what all jobs share."""
        params = config.hydra.sweeper.get("params") or {}
        overrides = [*(f"{k}={v}" for k, v in params.items()), *config.hydra.overrides.task]
        typed = parse(overrides)
        search = not str(config.hydra.sweeper._target_).endswith(".BasicSweeper")
        swept = {
            o.key_or_group: None if search else values_of(o) for o in typed if o.is_sweep_override()
        }
        names = config.hydra.job.config.override_dirname
        fixed = {o.key_or_group for o in typed} - swept.keys() | set(names.exclude_keys)
        quoted = ",".join(f"'{key}'" for key in sorted(fixed))
        with read_write(config), open_dict(config):
            key = "hydra.job.config.override_dirname.exclude_keys"
            config.hydra.overrides.hydra.append(f"{key}=[{quoted}]")
        NoteSweep.folder = folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        trials = config.hydra.sweeper.get("n_trials") if search else None
        note = {"overrides": overrides, "swept": swept, "trials": trials}
        write_json(folder / SWEEP, note)


def values_of(override: Override) -> list[str] | None:
    """Return the values of a swept option; None for a range."""
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else None


def describe(
    cfg: DictConfig,
    overrides: Sequence[str],
    choices: Mapping[str, Any],
    shared: Sequence[str] = (),
) -> Result:
    """Return the result of a run that begins.

    Args:
        cfg: the composed config.
        overrides: the options that were typed for this run.
        choices: the name that was chosen of each group.
        shared: the keys that all runs of a sweep share.
    """
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    assert isinstance(config, dict)
    plain: dict[str, Any] = {str(k): v for k, v in config.items()}
    keys = [o for o in parse(overrides) if not (o.is_delete() or o.key_or_group in shared)]
    keys = [o for o in keys if not (is_baseline(plain) and o.key_or_group.startswith("penalty."))]
    varied = {o.key_or_group: _value(plain, o) for o in keys}
    names = {str(k): v for k, v in choices.items() if not str(k).startswith("hydra/")}
    return Result(plain, list(overrides), varied, names)


def _value(config: Any, override: Override) -> Any:
    """Return the value of an option as the config has it; of a group, the name."""
    if is_group(override.key_or_group):
        return override.get_value_string()
    for part in override.key_or_group.split("."):
        if not isinstance(config, dict) or part not in config:
            return override.get_value_string()
        config = config[part]
    return config


def claim(job: Path, result: Result) -> Result | None:
    """Return a result that makes a job needless; else write that the job is running.

    A job is needless if it is finished, or if another job of the sweep is the same, and finished or
    running. Then the job's own result says so.

    Args:
        job: the folder of the job, inside of the sweep's.
        result: of the job, before it runs.
    """
    with locked(job.parent):
        others = sorted(path.parent for path in job.parent.glob("*/result.json"))
        for other in sorted(others, key=lambda path: path != job):
            found = Result.read(other)
            if found is None or not result.same(found) or found.status == "same":
                continue
            if found.status == "finished" and other == job:
                return found
            if found.status == "finished" or (
                found.state == "running" and found.pid != os.getpid()
            ):
                result.status, result.same_as = "same", other.name
                result.seconds = 0.0
                result.write(job)
                return replace(result, metrics=found.metrics)
        result.write(job)
    return None


def left_by(job: Path, result: Result) -> Path | None:
    """Return the last checkpoint of a job that was killed or interrupted; None if it has none.

    A job that failed starts again: what made it fail may be in the checkpoint.

    Args:
        job: the folder of the job.
        result: of the job, before it runs.
    """
    found, last = Result.read(job), job / LAST
    stopped = found is not None and found.state in ("killed", "interrupted") and result.same(found)
    return last if stopped and last.is_file() else None


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """A context that one process at a time is in; where a file system has no locks, all are."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say_end(place: Path, console: Console | None = None) -> int:
    """Print the table of a sweep, its best run, and what failed or did not run.

    Args:
        place: the folder of the sweep.
        console: to print to; None is the standard output.

    Returns:
        How many jobs did not finish.
    """
    results, note = results_in(place), read_sweep(place) or {"swept": {}, "trials": None}
    swept = note["swept"]
    jobs = jobs_of(swept)
    if jobs is not None:  # not those of an earlier command in the same folder
        results = {name: r for name, r in results.items() if r.options(swept) in jobs}
    if not results:
        return 0
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    keys = list(dict.fromkeys([*swept, *(key for r in results.values() for key in r.varied)]))
    metric = main_metric(list(results.values()))
    shown = [m for m in dict.fromkeys([metric, "test/acc", "test/loss"]) if m is not None]
    shown = [m for m in shown if any(m in r.metrics for r in results.values())]
    table = Table(title=str(place), title_justify="left")
    for name in ("job", *keys):
        table.add_column(name)
    for name in (*shown, "seconds"):
        table.add_column(name, justify="right")
    table.add_column("status")
    for name, r in results.items():
        row = [name.partition("-")[0], *(_word(r.varied.get(key)) for key in keys)]
        row += [_number(r.metrics.get(m)) for m in shown]
        row += ["" if r.seconds is None else f"{r.seconds:.1f}"]
        same = f"same as {str(r.same_as).partition('-')[0]}"
        table.add_row(*row, same if r.status == "same" else r.state)
    console.print()
    console.print(table)
    ran = {name: r for name, r in results.items() if r.status == "finished"}
    if metric is not None and ran:
        name = best(ran, metric)
        words = " ".join(f"{k}={_word(v)}" for k, v in ran[name].varied.items())
        console.print(f"  best    {metric} {_number(ran[name].metrics[metric])}: {words}")
        console.print(f"          {place / name}", soft_wrap=True)
    console.print(f"  report  python -m gpkit.report {place}", soft_wrap=True)
    bad = {n: r for n, r in results.items() if r.status not in ("finished", "same")}
    absent = missing(note, list(results.values())) if swept else []
    if not bad and not absent:
        return 0
    total = len(results) + len(absent)
    print(f"error: {len(bad) + len(absent)} of {total} jobs did not finish:", file=sys.stderr)
    for name, r in bad.items():
        print(f"  {place / name}: {r.error or r.state}", file=sys.stderr)
    for words, count in Counter(absent).items():
        print(f"  not run: {words}{f' ({count} times)' * (count > 1)}", file=sys.stderr)
    again = f"The same command with hydra.sweep.dir={place} runs only these again"
    if any(r.state in ("killed", "interrupted") for r in bad.values()):
        again += ", from their last checkpoint if they were stopped"
    print(again, file=sys.stderr)
    return len(bad) + len(absent)


def _word(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.3g}"
