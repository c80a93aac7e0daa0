"""Ctrl-C and SIGTERM: the exit code, and the line that says how to go on. Needs no torch."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal stopped the run. The exit code is 128 + its number, as a shell expects."""


@contextmanager
def stops_at_signals(checkpoint: Path, overrides: Sequence[str]) -> Iterator[None]:
    """A context in which a signal stops a run at once, with one line. A fit has its own handlers.

    Args:
        checkpoint: that a run leaves at the end of its training.
        overrides: the options of the run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be handled in the main thread
        return

    start = time.time()

    def stop(number: int, _: FrameType | None) -> None:
        fresh = checkpoint.is_file() and checkpoint.stat().st_mtime > start
        say_stopped(number, checkpoint if fresh else None, overrides, ended=True)
        raise Interrupted(128 + number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_stopped(
    number: int, checkpoint: Path | None, overrides: Sequence[str], *, ended: bool = False
) -> None:
    """Print which signal stopped a run, and the command that goes on from its checkpoint.

    Args:
        number: of the signal.
        checkpoint: to go on from; None, or no such file, if the run has written none.
        overrides: the options of the run.
        ended: whether nothing but the test is left, if there is a checkpoint.
    """
    left = "no checkpoint was written"
    if checkpoint is not None and checkpoint.is_file():
        own = [o for o in overrides if not o.startswith(("ckpt_path=", "task="))]
        words = [*own, *["task=test"] * ended, f"ckpt_path={checkpoint}"]
        what = "the training has ended, test it" if ended else "go on"
        left = f"{what} with: python train.py {shlex.join(words)}"
    print(f"stopped by {signal.Signals(number).name}; {left}", file=sys.stderr)
