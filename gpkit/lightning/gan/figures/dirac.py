"""`DiracPath`: logs the two parameters of a Dirac-GAN."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from gpkit.models.dirac import DiracCritic, DiracGenerator


class DiracPath(Callback):
    """Logs the parameters of a Dirac-GAN after each training step.

    ``dirac/theta`` is the generator's parameter θ, ``dirac/psi`` the critic's parameter ψ, and
    ``dirac/distance`` is √(θ² + ψ²), the distance from the equilibrium θ = ψ = 0.

    Raises:
        TypeError: at the start of a fit, if the nets are not `DiracGenerator` and `DiracCritic`.

    Source: Mescheder et al. (2018), arXiv:1801.04406.

    >>> import gpkit
    >>> from torch.utils.data import DataLoader
    >>> module = gpkit.GANModule(DiracGenerator(), DiracCritic(), latent_dim=1)
    >>> trainer = pl.Trainer(
    ...     max_steps=2, callbacks=[DiracPath()], logger=False, enable_checkpointing=False,
    ...     enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    ...     log_every_n_steps=1,
    ... )
    >>> trainer.fit(module, DataLoader(torch.zeros(4, 1), 2))
    >>> sorted(name for name in trainer.callback_metrics if name.startswith("dirac/"))
    ['dirac/distance', 'dirac/psi', 'dirac/theta']
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check the nets."""
        for name, kind in (("generator", DiracGenerator), ("critic", DiracCritic)):
            net = getattr(pl_module, name, None)
            if not isinstance(net, kind):
                raise TypeError(
                    f"`DiracPath` needs the {name} {kind.__name__}; got {type(net).__name__}: "
                    "use model=dirac, or leave DiracPath out"
                )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the parameters and the distance."""
        theta, psi = pl_module.generator.theta.detach(), pl_module.critic.psi.detach()
        distance = torch.linalg.vector_norm(torch.cat([theta, psi]))
        place = {"dirac/theta": theta, "dirac/psi": psi, "dirac/distance": distance}
        pl_module.log_dict(place)
