"""What every test shares: a seed, and one thread; nets so small would only wait for more."""

import logging
import os
import sys
from functools import partial

import pytest
import torch

import gpkit

collect_ignore = ["typing"]  # programs for the type checker, which nothing runs
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for one graph
torch.set_num_threads(1)
for name in ("pytorch_lightning", "lightning.pytorch"):  # "GPU available: False" and so on
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def graphs_alone(monkeypatch):
    """Let torch.compile trace the graphs, forward and backward, and run them without a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("gpkit.compiling.parity.faster", lambda *_: (1.0, 0.0))


@pytest.fixture
def no_long_way(monkeypatch):
    """Return a function that makes the long way of a call an error."""

    def close(*_, **__):
        raise AssertionError("the long way was taken")

    return lambda: monkeypatch.setattr(gpkit.GradientPenalty, "targets", close)


@pytest.fixture
def looks(monkeypatch):
    """The penalties that have taken the long way."""
    whole, found = gpkit.GradientPenalty.targets, []
    monkeypatch.setattr(
        gpkit.GradientPenalty, "targets", lambda p, *a: found.append(p) or whole(p, *a)
    )
    return found


def pytest_terminal_summary(terminalreporter):
    """Print the tables of the cells that ran: the properties of their reports."""
    reports = [r for group in terminalreporter.stats.values() for r in group]
    found = [p for r in reports for p in getattr(r, "user_properties", ())]
    sharded = dict(value for name, value in found if name == "sharded")
    if sharded:
        terminalreporter.section("FSDP2 and one process: largest parameter difference")
        for case, worst in sharded.items():
            terminalreporter.write_line(f"| {case} | {worst:.1e} |")
    matrix = sys.modules.get("matrix")  # imported by its tests alone: it loads Lightning
    if matrix is None:
        return
    lines = matrix.table({cell: value for name, (cell, value) in found if name == "cell"})
    if lines:
        terminalreporter.section("callback and by hand: largest parameter difference")
        for line in lines:
            terminalreporter.write_line(line)
