"""Histograms for TensorBoard, in some of the epochs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.lightning.bases import is_a


class Histograms:
    """Values that are collected over an epoch, and written at its end.

    Args:
        every_n_epochs: how often there are any, from the first epoch on; 0 is never.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs
        self._parts: dict[str, list[Tensor]] = {}

    def due(self, trainer: Any) -> bool:
        """Whether this epoch has histograms."""
        every = self.every_n_epochs
        return every > 0 and trainer.current_epoch % every == 0 and not trainer.sanity_checking

    def collect(self, name: str, values: Tensor) -> None:
        """Keep values for the end of the epoch."""
        self._parts.setdefault(name, []).append(values)

    def write_collected(self, trainer: Any, prefix: str) -> None:
        """Write, and forget, what was collected under names with a prefix."""
        for name in [name for name in self._parts if name.startswith(prefix)]:
            self.write(trainer, name, torch.cat(self._parts.pop(name)))

    def write(self, trainer: Any, name: str, values: Tensor) -> None:
        """Write a histogram of the finite ones among some values, if there are any."""
        values = values.float().cpu()
        values = values[values.isfinite()]
        for logger in trainer.loggers if len(values) else ():
            if is_a(logger, "TensorBoardLogger"):
                step = trainer.fit_loop.epoch_loop._batches_that_stepped  # of scalars
                logger.experiment.add_histogram(name, values, step)
