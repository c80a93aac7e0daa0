"""Folders of runs, made by hand: results with known metrics."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpkit.app.result import Result


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return Path("study")


@pytest.fixture
def put(place):
    """Write the result of a run, and return its folder."""

    def write(penalty="none", weight=0.1, seed=0, metrics=None, folder=None, **options):
        target = f"gpkit.{penalty}"
        config = {"penalty": {"_target_": target, "weight": weight}, "seed": seed}
        config |= {"model": {"width": 8}, "logger": {"at": str(folder)}}
        config |= options.pop("config", {})
        varied = {"penalty": penalty, "penalty.weight": weight, "seed": seed}
        if penalty == "none":
            del varied["penalty.weight"]
        fixed = {"started": "2026-01-01T00:00:00"}  # or the order would depend on the clock
        options = {"status": "finished", "seconds": 2.0, "varied": varied, **fixed, **options}
        typed = [f"penalty={penalty}", f"penalty.weight={weight}", f"seed={seed}"]
        folder = place / (folder or f"{penalty}-{weight}-{seed}")
        result = Result(config, typed, choices={"penalty": penalty, "model": "mlp"}, **options)
        result.metrics = metrics or {}
        result.write(folder)
        return folder

    return write


ACCURACY = {  # by penalty, weight and seed
    ("none", 0.1): (0.70, 0.72, 0.71),
    ("r1", 0.1): (0.75, 0.75, 0.78),
    ("r1", 1.0): (0.80, 0.90, 0.85),
    ("fisher", 1.0): (0.60, 0.62, 0.61),  # as far below the baseline for each seed
}


@pytest.fixture
def study(put, place):
    """Return the folder of a study of four groups and three seeds."""
    for (penalty, weight), values in ACCURACY.items():
        for seed, value in enumerate(values):
            metrics = {"test/acc": value, "test/loss": 1 - value, "test/grad_norm/weight": value**2}
            cost = 1.0 if penalty == "none" else 2.0 + seed
            put(penalty, weight, seed, metrics, cost_in_plain_steps=cost)
    return place


@pytest.fixture(scope="session")
def dead():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
