"""Stop at SIGINT and SIGTERM after the current step, with a checkpoint to go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning.callbacks import Callback

from gpkit.app.signals import SIGNALS, Interrupted, say_stopped


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
        self.overrides = overrides
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
            ended = trainer.is_last_batch and trainer.current_epoch + 1 >= trainer.max_epochs
            if trainer.is_global_zero:
                say_stopped(self._received, self.checkpoint, self.overrides, ended=ended)
            raise Interrupted(128 + self._received)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the handlers back; stop if a signal came after the last step."""
        self._restore()
        if self._received:
            if trainer.is_global_zero:
                say_stopped(self._received, self.checkpoint, self.overrides, ended=True)
            raise Interrupted(128 + self._received)

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
