"""`Sharpness`: the curvature in the weights, the generalisation gap, and what was memorised."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpkit import checks
from gpkit.autodiff.isolation import double_backward
from gpkit.lightning.batches import Batch
from gpkit.lightning.evaluation.base import (
    Evaluation,
    batches,
    differentiable,
    losses_of,
    outputs_of,
    read_batch,
)
from gpkit.lightning.evaluation.sharpness import hessian_product, top_eigenvalue, trace


class Sharpness(Evaluation):
    """Logs the curvature of the training loss in the weights, and what the net has memorised.

    ``test/hessian/top`` and ``test/hessian/trace``: of the mean loss of the first training samples,
    see `top_eigenvalue` and `trace`. ``test/gap/loss``: the loss of the test minus that of the
    whole training set; ``test/gap/acc``: the accuracy of the training set minus that of the test.
    ``test/memorised``: of the training samples that a data module lists in ``relabelled``, the
    share on which the net predicts the replaced label.

    Args:
        samples: of the training set, for the Hessian.
        steps: of the Lanczos method, each a product with the Hessian.
        probes: random vectors for the trace, each a product with the Hessian.
        seed: of the random numbers.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self, samples: int = 1024, steps: int = 40, probes: int = 40, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.samples = checks.integer("Sharpness(samples=...)", samples, 1)
        self.steps = checks.integer("Sharpness(steps=...)", steps, 1)
        self.probes = checks.integer("Sharpness(probes=...)", probes, 1)
        self._tested = Sums()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the random numbers, and forget an earlier test."""
        super().on_test_start(trainer, pl_module)
        self._tested = Sums()

    def measure(self, module: Any, batch: Batch) -> dict[str, Tensor]:
        """Add the loss and the accuracy of a batch."""
        with torch.no_grad():
            self._tested.add(module, batch)
        return {}

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Go through the training set, and log."""
        data = trainer.datamodule
        loader = getattr(data, "train_dataloader", lambda: None)()
        if not isinstance(loader, DataLoader):
            raise ValueError("`Sharpness` needs a data module with a train_dataloader")
        found: dict[str, float] = {}
        with differentiable():
            found |= self._of_hessian(pl_module, loader)
            trained = Sums()
            with torch.no_grad():
                for batch in batches(loader, loader.batch_size or 1):
                    trained.add(pl_module, read_batch(pl_module, batch))
        found["gap/loss"] = self._tested.loss - trained.loss
        if self._tested.classifies:
            found["gap/acc"] = trained.accuracy - self._tested.accuracy
            relabelled = getattr(data, "relabelled", None)
            if relabelled is not None and len(relabelled):
                found["memorised"] = float(torch.cat(trained.right)[relabelled].float().mean())
        for name, value in found.items():
            pl_module.log(f"test/{name}", float(value))

    def _of_hessian(self, module: Any, loader: Any) -> dict[str, float]:
        (batch,) = itertools.islice(batches(loader, self.samples), 1)
        read = read_batch(module, batch)
        parameters = [p for p in module.net.parameters() if p.requires_grad]
        with double_backward(1):
            loss = losses_of(module, read).mean()
            product = hessian_product(loss, parameters)
            size, like = sum(p.numel() for p in parameters), parameters[0].detach()
            options: dict[str, Any] = {"rng": self._rng, "like": like}
            return {
                "hessian/top": top_eigenvalue(product, size, steps=self.steps, **options),
                "hessian/trace": trace(product, size, samples=self.probes, **options),
            }


class Sums:
    """The mean loss and the accuracy of batches."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.right: list[Tensor] = []
        self.classifies = True

    def add(self, module: Any, batch: Batch) -> None:
        """Add a batch."""
        self.losses.append(losses_of(module, batch).cpu())
        out = outputs_of(module, batch, batch.x)
        self.classifies &= not batch.y.is_floating_point()
        if self.classifies:
            self.right.append((out.argmax(1) == batch.y).cpu())

    @property
    def loss(self) -> float:
        """The mean over samples."""
        return float(torch.cat(self.losses).mean())

    @property
    def accuracy(self) -> float:
        """The share of right samples."""
        return float(torch.cat(self.right).float().mean())
