"""The operations and the memory of a step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flops_of(step: Callable[[], None]) -> float:
    """Return the operations of a step in matrix products and convolutions, as torch counts them."""
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()
    try:
        with counter:
            step()
    except (RuntimeError, NotImplementedError):
        return float("nan")
    return float(counter.get_total_flops()) or float("nan")


class Untracked:
    """No modules for a count: torch's tracker of them forbids gradients in an input."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *exception: object) -> None:
        """Do nothing."""


@contextmanager
def _without_log() -> Iterator[None]:
    """A context in which torch's profiler starts without writing lines to the terminal.

    Its library, Kineto, reads how much to log from the environment, at the first profile of a
    process. Memory from before, which the step frees, does not count.
    """
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "6"  # above all kinds of lines
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Memory block of unknown size")
            yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def memory_of(step: Callable[[], None]) -> float:
    """Return the bytes that a step allocates at its peak, beyond what there was."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before) or float("nan")
    with (
        _without_log(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as prof,
    ):
        step()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak) or float("nan")
