"""`Evaluation`: what the callbacks share, and how they read batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from gpkit import checks
from gpkit.lightning.batches import Batch, unpack
from gpkit.lightning.recording import EVALUATION
from gpkit.losses import logits


class Evaluation(Callback):
    """What the callbacks share: they look at each batch of the test, and draw from their own seed.

    Args:
        seed: of the random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = checks.integer("seed=...", seed, 0)
        self._rng = torch.Generator()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse, before the first step, a module that has no net with a loss.

        Raises:
            TypeError: for such a module.
        """
        if not hasattr(pl_module, "per_sample_loss"):
            raise TypeError(
                f"`{type(self).__name__}` evaluates the net of a PenalizedModule; got a "
                f"{type(pl_module).__name__}: leave the callback out"
            )

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the random numbers."""
        self._rng = torch.Generator().manual_seed(self.seed)

    def on_test_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log what `measure` returns of a batch."""
        with differentiable():
            read = read_batch(pl_module, batch)
            found = self.measure(pl_module, read)
        for name, value in found.items():
            pl_module.log(f"test/{name}", value, batch_size=len(read.x), **EVALUATION)

    def measure(self, module: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the numbers of a batch by name: means over its samples.

        Args:
            module: the LightningModule.
            batch: of the test, read.
        """
        raise NotImplementedError


@contextmanager
def differentiable() -> Iterator[None]:
    """A context in which gradients exist, also inside of a test."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def read_batch(module: Any, batch: Any) -> Batch:
    """Return a batch, read, as tensors that gradients can be taken of."""
    moved = module.transfer_batch_to_device(batch, module.device, 0)
    return unpack(moved, module.net, module.inputs, module.target).map(Tensor.clone)


def outputs_of(module: Any, batch: Batch, x: Tensor) -> Tensor:
    """Return the outputs of the net at x, with the other inputs of the batch."""
    out: Tensor = logits(batch.call(module.net, x))
    return out


def losses_of(module: Any, batch: Batch) -> Tensor:
    """Return the loss of each sample."""
    losses: Tensor = module.per_sample_loss(outputs_of(module, batch, batch.x), batch.y)
    return losses


def batches(loader: Any, size: int) -> Iterable[Any]:
    """Return the samples of a loader in order, ``size`` at a time; nothing is drawn."""
    dataset = loader.dataset
    for start in range(0, len(dataset), size):
        yield loader.collate_fn([dataset[i] for i in range(start, min(start + size, len(dataset)))])
