"""What a step has to tell: numbers for the log, and values for histograms of the epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from gpkit.terms import Terms


class Notes:
    """Numbers, the latest of each name, and values, collected over an epoch.

    Args:
        every_n_epochs: how often histograms are written; 0 is never.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs
        self._numbers: dict[str, list[Tensor]] = {}
        self._of_this_step: set[str] = set()
        self._values: dict[str, list[Tensor]] = {}

    def begin_step(self) -> None:
        """Let numbers from now on replace those of the step before."""
        self._of_this_step.clear()

    def number(self, name: str, value: Tensor) -> None:
        """Keep a number of one batch of a step."""
        if name not in self._of_this_step:
            self._of_this_step.add(name)
            self._numbers[name] = []
        self._numbers[name].append(value.detach())

    def numbers(self, values: Mapping[str, Tensor]) -> None:
        """Keep several numbers by name."""
        for name, value in values.items():
            self.number(name, value)

    def latest(self) -> dict[str, Tensor]:
        """Return every number: the mean over the batches of the last step that had it."""
        return {name: torch.stack(parts).float().mean() for name, parts in self._numbers.items()}

    def values(self, name: str, values: Tensor, epoch: int) -> None:
        """Keep values ``[n]`` for the histogram of this epoch, if it has one."""
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self._values.setdefault(f"{name}/histogram", []).append(values.detach())

    def terms(self, terms: Mapping[str, Terms | None], zero: Tensor, epoch: int) -> None:
        """Keep what penalties are, by name: ``zero`` for those that skip the step."""
        for name, term in terms.items():
            self.number(f"penalty/{name}", zero if term is None else term.penalty)
            self.number(f"penalty/{name}/weight", zero + (0.0 if term is None else term.weight))
            if term is not None:
                self.values(f"penalty/{name}/norm", term.norms, epoch)

    def write(self, loggers: Iterable[Any], step: int) -> None:
        """Write the histograms to the TensorBoard loggers, and forget them."""
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, parts in self._values.items():
                    values = torch.cat(parts).float().cpu()
                    logger.experiment.add_histogram(name, values, step)
        self._values.clear()
