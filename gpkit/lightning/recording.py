"""What is logged about penalties and norms: scalars by name, and TensorBoard histograms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit.checks import is_a
from gpkit.formula import Terms
from gpkit.lightning.compat import steps_of

# Arguments of `LightningModule.log` at validation and test.
EVALUATION: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}


def penalty_scalars(
    names: Iterable[str], terms: Mapping[str, Terms | None]
) -> dict[str, Tensor | float]:
    """Return the scalars that are logged about penalties at one step.

    Args:
        names: the names of all penalties.
        terms: by name; None, or missing, for a penalty that does not act on this step.

    Returns:
        ``penalty/<name>``, weighted as it enters the loss, and ``penalty/<name>/weight``: both are
        0 if the penalty does not act. If it acts, also ``penalty/<name>/norm``, the mean norm.
    """
    scalars: dict[str, Tensor | float] = {}
    for name in names:
        term = terms.get(name)
        scalars[f"penalty/{name}"] = 0.0 if term is None else term.penalty.detach()
        scalars[f"penalty/{name}/weight"] = 0.0 if term is None else term.weight
        if term is not None:
            scalars[f"penalty/{name}/norm"] = term.mean_norm
    return scalars


@dataclass
class LatestStep:
    """What a module computed in its latest training step, to say which part is not finite.

    Args:
        scalars: the losses and penalties, by the names that they are logged under.
        terms: of each penalty by name; None if it did not act.
    """

    scalars: Mapping[str, Tensor | float]
    terms: Mapping[str, Terms | None]

    def not_finite(self) -> str:
        """Return the first loss or penalty that is not finite, in words; "" if all are finite."""
        for name, value in self.scalars.items():
            if torch.as_tensor(value).isfinite():
                continue
            found = f"{name} is {float(value)}"
            terms = self.terms.get(name.removeprefix("penalty/"))
            if terms is not None and len(terms.squared_norms) > 1:
                bad = int((~terms.squared_norms.isfinite()).sum())
                found += f" (the norms of {bad} of {len(terms.squared_norms)} samples)"
            return found
        return ""


class Histograms:
    """Collects values during an epoch, and writes their histograms to TensorBoard at its end.

    Args:
        every_n_epochs: the epochs 0, n, 2n, ... have histograms; 0 means that none has.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs
        self._parts: dict[str, list[Tensor]] = {}

    def due(self, trainer: Any) -> bool:
        """Whether this epoch has histograms."""
        every = self.every_n_epochs
        return every > 0 and trainer.current_epoch % every == 0 and not trainer.sanity_checking

    def collect(self, trainer: Any, name: str, values: Tensor) -> None:
        """Add values to the histogram ``<name>/histogram``, if this epoch has histograms."""
        if self.due(trainer):
            self._parts.setdefault(f"{name}/histogram", []).append(values.detach())

    def collect_norms(self, trainer: Any, terms: Mapping[str, Terms | None]) -> None:
        """Add the norms of the penalties that act to ``penalty/<name>/norm/histogram``."""
        if self.due(trainer):
            for name, term in terms.items():
                if term is not None:
                    self.collect(trainer, f"penalty/{name}/norm", term.norms)

    def write_collected(self, trainer: Any, prefix: str = "") -> None:
        """Write the collected histograms whose names start with a prefix, and drop their values."""
        for name in [name for name in self._parts if name.startswith(prefix)]:
            self.write(trainer, name, torch.cat(self._parts.pop(name)))

    def write(self, trainer: Any, name: str, values: Tensor) -> None:
        """Write one histogram now, of the finite values; without any, write none."""
        values = values.float().cpu()
        values = values[values.isfinite()]
        for logger in trainer.loggers if len(values) else ():
            if is_a(logger, "TensorBoardLogger"):
                logger.experiment.add_histogram(name, values, steps_of(trainer))


class LatestScalars:
    """Keeps scalars by name: the mean of each over the micro-batches of the last step that had it.

    Some scalars, such as the loss of a generator, are not there on every step.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._of_this_step: set[str] = set()

    def begin_step(self) -> None:
        """Start a step: what `add` brings from now on replaces older values."""
        self._of_this_step.clear()

    def add(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Add the scalars of one micro-batch."""
        for name, value in scalars.items():
            if name not in self._of_this_step:
                self._of_this_step.add(name)
                self._values[name] = []
            self._values[name].append(torch.as_tensor(value).detach())

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each scalar over the micro-batches of the last step that had it."""
        return {name: torch.stack(parts).float().mean() for name, parts in self._values.items()}
