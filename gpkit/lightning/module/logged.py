"""What a `PenalizedModule` logs: the scalars of its steps, and gradient norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from gpkit.lightning.compat import logs_now
from gpkit.lightning.module.forward import ForwardPass
from gpkit.lightning.norms import input_norms, weight_norm
from gpkit.lightning.recording import EVALUATION

TOTAL = "train/loss_total"


class StepLog:
    """The scalars of training steps, logged on those steps that can be seen.

    ``LightningModule.log`` takes as long as a small net's step, and on most steps its values are
    replaced before anything reads them. So they are kept here: each name has its latest value in
    the epoch, as Lightning keeps it.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Tensor | float] = {}

    def clear(self) -> None:
        """Forget all values: an epoch begins."""
        self._latest.clear()

    def add(self, module: pl.LightningModule, scalars: Mapping[str, Tensor | float]) -> None:
        """Add the scalars of a step, and log all if the step can be seen."""
        self._latest.update(scalars)
        if shows(module.trainer):
            self.write(module)

    def write(self, module: pl.LightningModule) -> None:
        """Log the latest values."""
        for name, value in self._latest.items():
            module.log(name, value, prog_bar=name == TOTAL)


def shows(trainer: Any) -> bool:
    """Whether what a step logs can be seen: in a logger, or at the end of an epoch or fit."""
    last = 0 <= trainer.max_steps <= trainer.global_step + 1
    return last or bool(trainer.is_last_batch) or logs_now(trainer)


def log_norms_of(module: Any, forward: ForwardPass, prefix: str, *, collect: bool) -> None:
    """Log ``<prefix>/weight``, and ``<prefix>/input`` where the forward pass has a graph in x.

    Args:
        module: a `PenalizedModule`.
        forward: its forward pass.
        prefix: of the names.
        collect: whether it is a training step, whose norms have a histogram too.
    """
    options: dict[str, Any] = {} if collect else EVALUATION
    size = len(forward.x)
    norm = weight_norm(forward.loss, module.net.parameters())
    module.log(f"{prefix}/weight", norm, batch_size=size, **options)
    if forward.x.requires_grad and forward.losses is not None:
        norms = input_norms(forward.losses, forward.x)
        module.log(f"{prefix}/input", norms.mean(), batch_size=size, **options)
        if collect:
            module.histograms.collect(module.trainer, f"{prefix}/input", norms)
