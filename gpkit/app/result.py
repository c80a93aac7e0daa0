"""``result.json``: what a run was, how it ended, and its metrics. Needs neither Hydra nor torch."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

NAME, LAST = "result.json", "checkpoints/last.ckpt"
# Options that change what a run shows and where, not what it computes.
SHOWN = ("run_dir", "total_steps", "logger", "optimized_metric")
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # set in each process of a distributed run


@dataclass
class Result:
    """A run, in plain values.

    Args:
        config: the composed config.
        overrides: the options that were typed.
        varied: what the sweep varies, with this run's values; of a single run, what was typed.
        choices: the name that was chosen of each group.
        status: running, finished, failed, interrupted by a signal, or same, as another run of the
            sweep. A run that is dead and says running was killed: see `state`.
        error: the line of the error of a run that failed.
        same_as: the folder of the run that is the same.
        metrics: the final metrics by name; None for one that is not finite.
        seconds: the wall time, with that before each stop of a run that went on.
        cost_in_plain_steps: the time of a training step, divided by that of a step without
            penalties; None if it was not measured.
        parameters: how many numbers were trained.
        tested: the checkpoint that was tested.
        started: the local time at which the run began.
        host: the machine of the run.
        pid: the process of the run.
        earlier_seconds: the part of the wall time up to the checkpoint that the run went on from.
    """

    config: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    varied: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    error: str | None = None
    same_as: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None
    cost_in_plain_steps: float | None = None
    parameters: int | None = None
    tested: str | None = None
    started: str = field(default_factory=lambda: datetime.now().isoformat(timespec="seconds"))
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    earlier_seconds: float = 0.0

    @property
    def state(self) -> str:
        """The status; killed for a run that says running and is dead."""
        if self.status != "running" or self.host != platform.node():
            return self.status
        return "running" if _alive(self.pid) else "killed"

    def options(self, keys: Iterable[str]) -> dict[str, str]:
        """Return those of the options that have one of these keys, as they were typed."""
        typed = dict(text.lstrip("+~").partition("=")[::2] for text in self.overrides)
        return {key: typed[key] for key in keys if key in typed}

    def same(self, other: Result) -> bool:
        """Whether another run computes the same: no penalty is the same for any weight of it."""
        return what_it_computes(self.config) == what_it_computes(other.config)

    def write(self, folder: Path) -> None:
        """Write ``result.json``."""
        if any(os.environ.get(name, "0") != "0" for name in RANKS):
            return  # one process of a run writes it
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NAME, plain(asdict(self)))

    @staticmethod
    def read(folder: Path) -> Result | None:
        """Return the result in a folder; None if there is none.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            found = json.loads((folder / NAME).read_text())
            known = {f.name for f in fields(Result)}
            return Result(**{k: v for k, v in found.items() if k in known})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / NAME} is no result of a run: {error}") from error


def what_it_computes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that the numbers of a run depend on.

    >>> none = {"_target_": "gpkit.none", "weight": 0.1}
    >>> what_it_computes({"penalty": none, "seed": 1, "logger": {}})
    {'penalty': {'_target_': 'gpkit.none'}, 'seed': 1}
    """
    kept = {k: v for k, v in config.items() if k not in SHOWN}
    if is_baseline(config):
        kept["penalty"] = {"_target_": config["penalty"]["_target_"]}
    return kept


def is_baseline(config: Mapping[str, Any]) -> bool:
    """Whether a run has no penalty."""
    penalty = config.get("penalty")
    return isinstance(penalty, Mapping) and penalty.get("_target_") == "gpkit.none"


@contextmanager
def recorded(
    result: Result, folder: Path, tell: Callable[[BaseException], str]
) -> Iterator[Result]:
    """A context for a run, at whose end ``result.json`` says how it ended.

    Args:
        result: of the run so far.
        folder: of the run.
        tell: returns the line of an error.

    Yields:
        The result, to be filled.

    Raises:
        BaseException: what the run raises.
    """
    start = time.perf_counter()
    result.write(folder)
    try:
        yield result
        result.status = "finished"
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            result.status = "interrupted"
        else:
            result.status, result.error = "failed", tell(error)
        raise
    finally:
        result.seconds = result.earlier_seconds + time.perf_counter() - start
        result.write(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON: beside its place first, so that the file is never half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the options of a config by their dotted names.

    >>> flattened({"model": {"width": 3}, "seed": 0})
    {'model.width': 3, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if prefix or key not in SHOWN:
            below = isinstance(value, Mapping)
            flat |= flattened(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return flat


def plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite become words.

    >>> plain({"weight": math.inf, "sizes": (1, 2)})
    {'weight': 'inf', 'sizes': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def larger_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is better: of accuracies and counts, not of losses.

    Args:
        metric: its name in ``metrics.json``.

    Returns:
        False for any other.

    >>> larger_is_better("test/acc"), larger_is_better("val/loss"), larger_is_better("val/mae")
    (True, False, False)
    """
    name = metric.rpartition("/")[2]
    return any(word in name for word in ("acc", "auroc", "f1", "covered", "high_quality", "r2"))


def main_metric(results: Sequence[Result]) -> str | None:
    """Return the metric that runs are compared by: the optimised one, or one of the test."""
    names = [name for r in results for name, value in r.metrics.items() if value is not None]
    asked = [str(r.config.get("optimized_metric")) for r in results]
    for name in [
        *asked,
        "test/acc",
        "test/loss",
        "modes/covered",
        "wasserstein/debiased",
        *sorted(names),
    ]:
        if name in names:
            return name
    return None


def best(results: Mapping[str, Result], metric: str) -> str:
    """Return the name of the run with the best value of a metric."""
    values = {name: v for name, r in results.items() if (v := r.metrics.get(metric)) is not None}
    return (max if larger_is_better(metric) else min)(values, key=lambda name: values[name])


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics with None for what is not finite, which JSON does not have."""
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, so it is there
        return True
    return True
