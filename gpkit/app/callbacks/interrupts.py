"""Stop at SIGINT and SIGTERM after the current step, with a checkpoint to go on from."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning.callbacks import Callback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal stopped the run. The exit code is 128 + its number, as a shell expects."""


class StopAtSignal(Callback):
    """On Ctrl-C or SIGTERM, finishes the step, writes ``last.ckpt``, and says how to go on.

    A second signal stops at once. With several processes the checkpoint of the last epoch is left:
    they may get the signal in different steps.

    Args:
        checkpoint: the file to write.
        overrides: the options of the run, for the line that says how to go on.
    """

    def __init__(self, checkpoint: Path, overrides: Sequence[str]) -> None:
        self.checkpoint = checkpoint
        self.overrides = [o for o in overrides if not o.startswith("ckpt_path=")]
        self._received = 0
        self._handlers: dict[Any, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Install the handlers; signals can only be handled in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Stop if a signal came during this step."""
        if self._received:
            if trainer.world_size == 1:
                trainer.save_checkpoint(self.checkpoint, weights_only=False)
            self._say(trainer)
            raise Interrupted(128 + self._received)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the handlers back."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the handlers back."""
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received:
            raise Interrupted(128 + number)
        self._received = number

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _say(self, trainer: Any) -> None:
        if trainer.is_global_zero:
            name = signal.Signals(self._received).name
            left = "no checkpoint was written"
            if self.checkpoint.is_file():
                again = " ".join([*self.overrides, f"ckpt_path={self.checkpoint}"])
                left = f"go on with: python train.py {again}"
            print(f"stopped by {name} in epoch {trainer.current_epoch}; {left}", file=sys.stderr)
