"""`CriticLayers`: logs the gradient of the critic's loss layer by layer."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from gpkit import checks
from gpkit.lightning.gan.figures.callback import undisturbed


class CriticLayers(Callback):
    r"""Logs, at the end of an epoch, how the gradient goes down through the layers of a critic.

    .. math:: \Big\| \frac{\partial}{\partial h_l}
              \big(\text{mean}_j D(\text{fake}_j) - \text{mean}_i D(\text{real}_i)\big) \Big\|

    h_l are the outputs of the l-th linear layer or convolution for all samples of a batch, real and
    fake. ``critic_layer/1`` is the first, that of the inputs. The norm is taken in float64, where
    the square of a vanishing gradient is not zero. Random numbers and modes stay unchanged.

    Args:
        samples: how many real samples there are, and as many fakes.

    Raises:
        ValueError: if it is out of range.

    Source: Gulrajani et al. (2017), arXiv:1704.00028, figure 1b.

    >>> import gpkit
    >>> from torch.utils.data import DataLoader
    >>> critic = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> module = gpkit.GANModule(nn.Linear(2, 2), critic, latent_dim=2)
    >>> trainer = pl.Trainer(
    ...     max_epochs=1, callbacks=[CriticLayers(8)], logger=False, enable_checkpointing=False,
    ...     enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    ... )
    >>> trainer.fit(module, DataLoader(torch.randn(8, 2), 8))
    >>> round(trainer.callback_metrics["critic_layer/2"].item(), 4)  # of the scores: √(2/8)
    0.5
    """

    def __init__(self, samples: int = 128) -> None:
        self.samples = checks.integer("CriticLayers(samples=...)", samples, 1)
        self._real: list[Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forget the data of the last epoch."""
        self._real = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first samples of an epoch."""
        x = batch[0] if isinstance(batch, list | tuple) else batch
        if sum(map(len, self._real)) < self.samples:
            self._real.append(x.detach())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the norms."""
        real = torch.cat(self._real)[: self.samples]
        with undisturbed(pl_module), torch.enable_grad():
            norms = by_layer(pl_module.critic, real, pl_module.sample(len(real)).detach())
        pl_module.log_dict({f"critic_layer/{i}": n for i, n in enumerate(norms, start=1)})


def by_layer(critic: nn.Module, real: Tensor, fake: Tensor) -> list[Tensor]:
    """Return the norm, in float64, of the gradient in the outputs of each layer, the first first.

    Args:
        critic: ``critic(x)``, with scores ``[B]`` or ``[B, 1]``.
        real: ``[B, *S]``.
        fake: ``[B, *S]``.
    """
    outputs: list[Tensor] = []
    layers = [m for m in critic.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    hooks = [m.register_forward_hook(lambda *args: outputs.append(args[2])) for m in layers]
    try:
        of_real, of_fake = critic(torch.cat([real, fake])).split([len(real), len(fake)])
    finally:
        for hook in hooks:
            hook.remove()
    grads = torch.autograd.grad(of_fake.mean() - of_real.mean(), outputs)
    return [g.double().norm() for g in grads]
