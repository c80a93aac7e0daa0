"""What is logged of penalties and norms: numbers by name, and histograms for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gpkit.formula import Terms
from gpkit.lightning.compat import is_a, steps_of

# Options of `log` at validation and test.
EVALUATION: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}


def penalty_numbers(
    names: Iterable[str], terms: Mapping[str, Terms | None]
) -> dict[str, Tensor | float]:
    """Return what is logged of penalties at a step.

    Args:
        names: of all penalties.
        terms: by name; None, or absent, for a penalty that is skipped.

    Returns:
        ``penalty/<name>``, as it enters the loss, ``penalty/<name>/weight``, and of those that act
        ``penalty/<name>/norm``, the mean norm.
    """
    numbers: dict[str, Tensor | float] = {}
    for name in names:
        term = terms.get(name)
        numbers[f"penalty/{name}"] = 0.0 if term is None else term.penalty.detach()
        numbers[f"penalty/{name}/weight"] = 0.0 if term is None else term.weight
        if term is not None:
            numbers[f"penalty/{name}/norm"] = term.norms.detach().mean()
    return numbers


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

    def collect(self, trainer: Any, name: str, values: Tensor) -> None:
        """Keep values for ``<name>/histogram`` at the end of the epoch, if it has histograms."""
        if self.due(trainer):
            self._parts.setdefault(f"{name}/histogram", []).append(values.detach())

    def collect_norms(self, trainer: Any, terms: Mapping[str, Terms | None]) -> None:
        """Keep the norms of the penalties that act, as ``penalty/<name>/norm/histogram``."""
        if self.due(trainer):
            for name, term in terms.items():
                if term is not None:
                    self.collect(trainer, f"penalty/{name}/norm", term.norms)

    def write_collected(self, trainer: Any, prefix: str = "") -> None:
        """Write, and forget, what was collected under names with a prefix."""
        for name in [name for name in self._parts if name.startswith(prefix)]:
            self.write(trainer, name, torch.cat(self._parts.pop(name)))

    def write(self, trainer: Any, name: str, values: Tensor) -> None:
        """Write a histogram of the finite ones among some values, if there are any."""
        values = values.float().cpu()
        values = values[values.isfinite()]
        for logger in trainer.loggers if len(values) else ():
            if is_a(logger, "TensorBoardLogger"):
                logger.experiment.add_histogram(name, values, steps_of(trainer))

    def clear(self) -> None:
        """Forget what was collected."""
        self._parts.clear()


class LatestNumbers:
    """Numbers by name: of each, the mean over the batches of the last step that had it."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[Tensor]] = {}
        self._of_this_step: set[str] = set()

    def begin_step(self) -> None:
        """Let numbers from now on replace those of the step before."""
        self._of_this_step.clear()

    def add(self, numbers: Mapping[str, Tensor | float]) -> None:
        """Keep numbers of one batch of a step."""
        for name, value in numbers.items():
            if name not in self._of_this_step:
                self._of_this_step.add(name)
                self._numbers[name] = []
            self._numbers[name].append(torch.as_tensor(value).detach())

    def means(self) -> dict[str, Tensor]:
        """Return every number: the mean over the batches of the last step that had it."""
        return {name: torch.stack(parts).float().mean() for name, parts in self._numbers.items()}
