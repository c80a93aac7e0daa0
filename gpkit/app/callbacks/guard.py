"""Stop a run at the first loss, penalty, gradient or weight that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from gpkit.app.callbacks.share import all_finite, bad_gradients, bad_losses, bad_samples
from gpkit.lightning.compat import scaler_of
from gpkit.lightning.recording import LatestStep


class NonFiniteError(ArithmeticError):
    """A loss, a penalty, a gradient or a weight is not finite: training cannot go on."""


class FiniteGuard(Callback):
    """Stops a fit at the first value that is not finite, before the optimiser uses it.

    On the CPU each loss is checked before its backward pass, and each gradient before its optimiser
    step. On other devices a check would wait for the device, so it is done when the trainer logs.
    Weights are checked before a checkpoint is written: the last one on disk stays good. Gradients
    of a gradient scaler may overflow, which skips the step: they are not checked.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, to look at it if a value is not finite."""
        self._batch = batch

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Check the loss."""
        if self._looks(trainer, loss) and not loss.isfinite():
            found = pl_module.latest_step.not_finite() if tells(pl_module) else ""
            if found.startswith("train/loss"):
                found += bad_losses(pl_module, self._batch)
            raise NonFiniteError(self._message(trainer, found or f"the loss is {loss.item()}"))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Check the gradients."""
        if scaler_of(trainer) is not None:
            return
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if grads and self._looks(trainer, grads[0]) and not all_finite(grads):
            names = (
                name
                for name, p in pl_module.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            )
            found = f"the gradient of {next(names)} is not finite, though the loss is"
            found += bad_gradients(pl_module, self._batch)
            raise NonFiniteError(self._message(trainer, found))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Check the weights and the validation loss before the best checkpoint is written."""
        self._check_weights(trainer, pl_module)
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not loss.isfinite() and not trainer.sanity_checking:
            self._batch = None  # of the training data, which are not the cause
            found = f"val/loss is {loss.item()}, though the weights are finite"
            raise NonFiniteError(self._message(trainer, found))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Check the weights before the last checkpoint is written."""
        self._check_weights(trainer, pl_module)

    def _looks(self, trainer: Any, tensor: Tensor) -> bool:
        if tensor.device.type == "cpu":
            return True
        return bool((trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0)

    def _check_weights(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or not trainer.fit_loop.total_batch_idx + 1:
            return
        bad = [n for n, p in pl_module.named_parameters() if not p.isfinite().all()]
        if bad:
            raise NonFiniteError(self._message(trainer, f"the weight {bad[0]} is not finite"))

    def _message(self, trainer: Any, found: str) -> str:
        """Return what is not finite, where, why it may be, and what is left."""
        step = trainer.fit_loop.total_batch_idx
        line = f"{found}, at step {step} in epoch {trainer.current_epoch}"
        samples = bad_samples(self._batch)
        if samples:
            line += f": {samples} have a value that is not finite, so look at the data"
        elif self._batch is None:
            line += ": look at the validation data"
        else:
            line += ": the data are finite; try a smaller optimizer.lr or penalty.weight"
        return f"{line}. {_left(trainer)}"


def require_finite_test(metrics: Mapping[str, float]) -> None:
    """Refuse a loss of the test that is not finite: the training ended well, so it is the data's.

    Raises:
        NonFiniteError: for such a loss.
    """
    loss = metrics.get("test/loss", 0.0)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"test/loss is {loss}, though the weights are finite: look at the test data. The "
            "checkpoints are good"
        )


def tells(module: Any) -> bool:
    """Whether a module says what it computed in its latest step, as those of gpkit do."""
    return isinstance(getattr(module, "latest_step", None), LatestStep)


def _left(trainer: pl.Trainer) -> str:
    paths = [str(c.best_model_path) for c in trainer.checkpoint_callbacks if c.best_model_path]  # type: ignore[attr-defined]
    if not paths:
        return "No checkpoint had been written yet"
    return f"The last good checkpoint is {paths[-1]}"
