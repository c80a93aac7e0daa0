"""`GANFigures`: draws the samples and the critic of a GAN during training."""

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
from gpkit.lightning.compat import steps_of
from gpkit.lightning.gan.ema import evaluating
from gpkit.lightning.gan.figures import drawings
from gpkit.lightning.gan.figures.coverage import modes_covered
from gpkit.lightning.gan.scores import joined


class GANFigures(Callback):
    """Draws the samples and the critic of a GAN at the end of epochs, and counts covered modes.

    The module needs ``critic(x)`` and ``sample(n)``, as `GANModule` has; if its attribute
    ``conditional`` is true, ``critic(x, y)`` and ``sample(n, y)``. The callback writes these images
    to TensorBoard:

    - ``samples``: samples beside the data, for points in the plane ``[B, 2]`` and for images
      ``[B, C, H, W]``. If the nets take labels, the samples have the labels of the data.
    - ``surface``: for points in the plane, contours of the critic's scores, with data and samples
      on top. With labels it is the mean of the scores over the labels, and of a list of scores the
      sum over the scales. A critic of packs (``GANModule(pac=...)``) has none.

    The latest image of each kind is also saved as ``figures/<name>.png`` in the folder of the
    TensorBoard logger, or without one in the trainer's ``default_root_dir``. With a data module
    that has the attributes ``modes`` and ``std``, such as `EightGaussians`, it logs
    ``modes/covered`` and ``modes/high_quality``, see `modes_covered`.

    The data are the first batches of the epoch; no extra batch is loaded. Random numbers, gradients
    and the train or evaluation mode of the nets stay unchanged. In a distributed run only rank 0
    draws.

    Args:
        every_n_epochs: draw after every n-th epoch, and always after the last one.
        points: number of points to draw and to count modes with.
        columns: rows and columns of a grid of images.

    Raises:
        ValueError: if an option is out of range; or at the first batch, if it holds neither points
            in the plane nor images.

    >>> import gpkit, pytorch_lightning as pl, tempfile
    >>> from torch.utils.data import DataLoader
    >>> nets = nn.Linear(2, 2), nn.Linear(2, 1)
    >>> folder = tempfile.TemporaryDirectory()
    >>> trainer = pl.Trainer(
    ...     max_epochs=1, callbacks=[GANFigures(points=8)], default_root_dir=folder.name,
    ...     logger=False, enable_checkpointing=False, enable_progress_bar=False,
    ...     enable_model_summary=False, accelerator="cpu",
    ... )
    >>> trainer.fit(gpkit.GANModule(*nets, latent_dim=2), DataLoader(torch.randn(8, 2), 8))
    >>> sorted(path.name for path in Path(folder.name, "figures").iterdir())
    ['samples.png', 'surface.png']
    >>> folder.cleanup()
    """

    def __init__(self, every_n_epochs: int = 10, points: int = 2500, columns: int = 8) -> None:
        """Check the options."""
        self.every_n_epochs = checks.integer("GANFigures(every_n_epochs=...)", every_n_epochs, 1)
        self.points = checks.integer("GANFigures(points=...)", points, 1)
        self.columns = checks.integer("GANFigures(columns=...)", columns, 1)
        self.box: drawings.Box | None = None  # of the first figure, and used for all of a run
        self._real: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the box of the last run."""
        self.box = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the data of the last epoch."""
        self._real, self._labels = [], []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batches of an epoch, as many samples as are drawn."""
        x, *y = batch if isinstance(batch, list | tuple) else (batch,)
        wanted = self.points if require_drawable(x) == "points" else self.columns**2
        if trainer.is_global_zero and sum(map(len, self._real)) < wanted:
            self._real.append(x.detach())
            self._labels.extend(y[:1])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, if figures are due."""
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
        figures = {"samples": drawings.draw_points(real, samples, box)}
        if getattr(module, "pac", 1) == 1:  # a critic of packs has no score of a point
            values = drawings.surface(lambda points: scores(module.critic, points.to(real), y), box)
            figures["surface"] = drawings.draw_surface(values, box, real, samples)
        return figures

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
            logger.experiment.add_image(name, pixels, steps_of(trainer), dataformats="HWC")
        folder = Path(loggers[0].log_dir if loggers else trainer.default_root_dir, "figures")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")


def require_drawable(x: Any) -> str:
    """Return whether x holds "points" or "images".

    Args:
        x: points in the plane ``[B, 2]``, or images ``[B, C, H, W]`` with C 1 or 3.

    Returns:
        "points" or "images".

    Raises:
        ValueError: if x holds neither.

    >>> require_drawable(torch.zeros(5, 2)), require_drawable(torch.zeros(5, 3, 8, 8))
    ('points', 'images')
    """
    shape = list(x.shape) if isinstance(x, Tensor) else []
    if len(shape) == 2 and shape[1] == 2:
        return "points"
    if len(shape) == 4 and shape[1] in (1, 3):
        return "images"
    raise ValueError(
        "`GANFigures` draws points in the plane [B, 2], or images [B, C, H, W] with 1 or 3 "
        f"channels; got {shape or type(x).__name__}: leave it out for these data"
    )


def scores(critic: nn.Module, points: Tensor, y: Tensor | None) -> Tensor:
    """Return the critic's scores of points; with labels their mean over the labels.

    Args:
        critic: ``critic(x)``, or with labels ``critic(x, y)``.
        points: ``[P, 2]``.
        y: labels of the data, or None. Each distinct label counts once; of more than 32 distinct
            labels at most 32 are used.

    Returns:
        The scores, ``[P, ...]``.
    """
    if y is None:
        return joined(critic(points))
    labels = y.unique(dim=0)
    labels = labels[:: -(-len(labels) // 32)]
    of = [joined(critic(points, y.expand(len(points), *y.shape))) for y in labels]
    return torch.stack(of).mean(0)


@contextmanager
def undisturbed(module: pl.LightningModule) -> Iterator[None]:
    """Put all nets into evaluation mode; at the end restore their modes and the RNG state."""
    state = random_state(module.device)
    with evaluating(module):
        try:
            yield
        finally:
            set_random_state(state, module.device)
