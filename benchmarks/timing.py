"""Times of steps that take turns in one thread, and their ratios."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Collection
from itertools import pairwise
from random import shuffle

import torch
from torch import nn

Step = Callable[[], object]


def prepare() -> None:
    """Use one thread, switch off what falls on one step or another, and keep freed memory.

    glibc gives memory that was freed back, and each step waits for new pages. On a virtual machine
    that is up to a third of a step with weights of a megabyte, and not of the arithmetic.
    ``--give-back`` leaves it as it is.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "--give-back" not in sys.argv:
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(trim, 2**30)
        mallopt(mmap, 2**25)


def mlp(*widths: int, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Return an MLP of these widths."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def times(
    steps: dict[str, Step], rounds: int = 5, seconds: float = 0, slow: Collection[str] = ()
) -> dict[str, list[float]]:
    """Return the CPU seconds of each step in each round; the steps take turns, in random order.

    Args:
        steps: by name.
        rounds: the least number of rounds.
        seconds: of CPU time, in which there are further rounds.
        slow: the names of steps that take part in each fifth round.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(1 if name in slow else 3):
            step()
    end, count, order = time.process_time() + seconds, 0, [*steps.items()]
    while count < rounds or time.process_time() < end:
        shuffle(order)  # a step finds in the caches what the one before has left
        for name, step in order:
            if count % 5 and name in slow:
                found[name].append(float("nan"))
                continue
            start = time.process_time()
            step()
            found[name].append(time.process_time() - start)
        count += 1
    return found


def ratios(a: list[float], b: list[float]) -> list[float]:
    """Return a / b of each round that has both."""
    return [x / y for x, y in zip(a, b, strict=True) if x == x and y == y]


def ratio(a: list[float], b: list[float]) -> str:
    """Return the quartiles of a / b over the rounds, and the ratio of the least of each."""
    low, middle, high = statistics.quantiles(ratios(a, b), n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}], least {min(a) / min(b):.2f}"
