"""The path of a Dirac-GAN."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from gpkit.models.dirac import DiracCritic, DiracGenerator


class DiracPath(Callback):
    """Logs where a Dirac-GAN is: ``dirac/theta``, ``dirac/psi`` and ``dirac/distance``.

    The last is √(θ² + ψ²), the distance from the equilibrium at zero.

    Raises:
        TypeError: At the start, if the nets are others.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuse other nets."""
        for name, kind in (("generator", DiracGenerator), ("critic", DiracCritic)):
            net = getattr(pl_module, name, None)
            if not isinstance(net, kind):
                raise TypeError(
                    f"`DiracPath` needs the {name} {kind.__name__}; got {type(net).__name__}: "
                    "take model=dirac, or leave it out"
                )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the place after a step."""
        theta, psi = pl_module.generator.theta.detach(), pl_module.critic.psi.detach()
        distance = torch.linalg.vector_norm(torch.cat([theta, psi]))
        place = {"dirac/theta": theta, "dirac/psi": psi, "dirac/distance": distance}
        pl_module.log_dict(place)
