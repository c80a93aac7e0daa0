"""Figures of a GAN while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.random import random_state, set_random_state
from gpkit.lightning.gan.figures import drawings
from gpkit.lightning.gan.figures.coverage import modes_covered


class GANFigures(Callback):
    """Draws what a GAN makes, and counts the modes that it covers, at the end of epochs.

    It serves a module that has ``critic(x)`` and ``sample(n)``, as `GANModule` has, or, where its
    ``conditional`` is true, ``critic(x, y)`` and ``sample(n, y)``. To TensorBoard it writes

    - ``samples``: for points in the plane and for images, the samples beside the data, with the
      data's labels if there are any;
    - ``surface``: for points in the plane, the contours of the critic's values, with data and
      samples on top. Of a critic with labels it is the mean over the labels.

    The latest of each is ``figures/<name>.png`` in the folder of the TensorBoard logger, or of the
    trainer if there is none. For a data module with the attributes ``modes`` and ``std``, as
    `EightGaussians` has, it logs ``modes/covered`` and ``modes/high_quality``: see
    `modes_covered`.

    The data are those of the epoch's first batches, and nothing is drawn from a loader. Random
    numbers, gradients, and the modes of the nets are left as they are. In a distributed run rank
    zero draws.

    Args:
        every_n_epochs: How often; at the end of the last epoch in any case.
        points: The points that are drawn and that modes are counted with.
        columns: Of a grid of images, which is a square.

    Raises:
        ValueError: If an option is out of range, or at the first batch if it holds neither points
            in the plane nor images.
    """

    def __init__(self, every_n_epochs: int = 10, points: int = 2500, columns: int = 8) -> None:
        """Keep the options."""
        self.every_n_epochs = checks.integer("GANFigures(every_n_epochs=...)", every_n_epochs, 1)
        self.points = checks.integer("GANFigures(points=...)", points, 1)
        self.columns = checks.integer("GANFigures(columns=...)", columns, 1)
        self.box: drawings.Box | None = None  # of the first figure, and so of all
        self._real: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the run before."""
        self.box = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the epoch before."""
        self._real, self._labels = [], []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batches of an epoch, as many as are drawn."""
        x, *y = batch if isinstance(batch, list | tuple) else (batch,)
        wanted = self.points if require_drawable(x) == "points" else self.columns**2
        if trainer.is_global_zero and sum(map(len, self._real)) < wanted:
            self._real.append(x.detach())
            self._labels.extend(y[:1])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, if it is time."""
        if not trainer.is_global_zero or not self._real or not self._is_due(trainer):
            return
        y = torch.cat(self._labels) if getattr(pl_module, "conditional", False) else None
        with torch.no_grad(), undisturbed(pl_module):
            figures = self._figures(trainer, pl_module, torch.cat(self._real), y)
        for name, figure in figures.items():
            self._write(trainer, name, figure)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        stops = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        return epoch % self.every_n_epochs == 0 or epoch == last or stops

    def _figures(
        self, trainer: pl.Trainer, module: Any, real: Tensor, y: Tensor | None
    ) -> dict[str, Figure]:
        if require_drawable(real) == "images":
            real, y = real[: self.columns**2], None if y is None else y[: self.columns**2]
            samples = module.sample(len(real)) if y is None else module.sample(len(real), y)
            return {"samples": drawings.draw_images(real, samples, self.columns)}
        real, y = real[: self.points], None if y is None else y[: self.points]
        given = [] if y is None else [y.repeat(-(-self.points // len(y)))[: self.points]]
        samples = module.sample(self.points, *given)
        self._count_modes(trainer, module, samples)
        box = self.box = self.box or drawings.box_around(real)
        values = drawings.surface(lambda points: scores(module.critic, points.to(real), y), box)
        return {
            "samples": drawings.draw_points(real, samples, box),
            "surface": drawings.draw_surface(values, box, real, samples),
        }

    def _count_modes(
        self, trainer: pl.Trainer, module: pl.LightningModule, samples: Tensor
    ) -> None:
        data = getattr(trainer, "datamodule", None)
        modes, std = getattr(data, "modes", None), getattr(data, "std", None)
        if modes is None or std is None:
            return
        found = modes_covered(samples, modes.to(samples.device), std)
        module.log("modes/covered", float(found.covered), rank_zero_only=True)
        module.log("modes/high_quality", found.high_quality, rank_zero_only=True)

    def _write(self, trainer: pl.Trainer, name: str, figure: Figure) -> None:
        pixels = drawings.rendered(figure)
        loggers = [log for log in trainer.loggers if isinstance(log, TensorBoardLogger)]
        for logger in loggers:
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")
        folder = Path(loggers[0].log_dir if loggers else trainer.default_root_dir, "figures")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")


def require_drawable(x: Any) -> str:
    """Return "points" or "images", which is what x holds.

    Raises:
        ValueError: If it holds neither.

    Examples:
        >>> require_drawable(torch.zeros(5, 2)), require_drawable(torch.zeros(5, 3, 8, 8))
        ('points', 'images')
    """
    shape = list(x.shape) if isinstance(x, Tensor) else []
    if len(shape) == 2 and shape[1] == 2:
        return "points"
    if len(shape) == 4 and shape[1] in (1, 3):
        return "images"
    raise ValueError(
        "`GANFigures` must be given points in the plane [B, 2], or images [B, C, H, W] with 1 or 3 "
        f"channels; got {shape or type(x).__name__}: leave it out for these data"
    )


def scores(critic: nn.Module, points: Tensor, y: Tensor | None) -> Tensor:
    """Return a critic's scores, which for a critic with labels are means over the labels.

    Args:
        critic: ``critic(x)``, or with labels ``critic(x, y)``.
        points: [P, 2].
        y: Labels of the data, of which each counts once, and 32 at most; None for a critic without.

    Returns:
        The scores, [P, ...].
    """
    if y is None:
        return critic(points)
    labels = y.unique(dim=0)
    labels = labels[:: -(-len(labels) // 32)]
    return torch.stack([critic(points, y.expand(len(points), *y.shape)) for y in labels]).mean(0)


@contextmanager
def undisturbed(module: pl.LightningModule) -> Iterator[None]:
    """Evaluate nets, and then leave their modes and the random numbers as they were."""
    modes = [(part, part.training) for part in module.modules()]
    state = random_state(module.device)
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        set_random_state(state, module.device)
