"""What a run adds to its checkpoints, so that it can go on and be loaded, in plain values."""

from __future__ import annotations

import random
import time
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from gpkit.app.checkpoints import CONFIG, METRICS, NETS, RANDOM, SECONDS
from gpkit.autodiff.random import random_state, set_random_state


class RandomStates(Callback):
    """Saves the states of the random number generators, so that a resumed run is the run.

    They are set at the first batch after a resume: what the start of a run draws does not count.
    With several processes each has its own states, and they are not saved.
    """

    def __init__(self) -> None:
        self._to_set: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the states of torch, the device, NumPy and Python as tensors and plain numbers."""
        if trainer.world_size == 1:
            name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
            checkpoint[RANDOM] = {
                "torch": list(random_state(pl_module.device)),
                "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
                "python": random.getstate(),
            }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the states until the first batch."""
        self._to_set = checkpoint.get(RANDOM)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the states, once."""
        state, self._to_set = self._to_set, None
        if state is not None:
            set_random_state(tuple(state["torch"]), pl_module.device)
            name, keys, *rest = state["numpy"]
            np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
            version, numbers, last = state["python"]
            random.setstate((version, tuple(numbers), last))


class Progress(Callback):
    """Saves the metrics so far, for a run that was stopped before its test, and the wall time.

    Args:
        earlier: the seconds that the run had taken when it was stopped.

    Attributes:
        metrics: those of the checkpoint that the run went on from.
    """

    def __init__(self, earlier: float = 0.0) -> None:
        self.metrics: dict[str, float] = {}
        self._start = time.perf_counter() - earlier

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add both as plain numbers."""
        checkpoint[METRICS] = {k: float(v) for k, v in trainer.callback_metrics.items()}
        checkpoint[SECONDS] = time.perf_counter() - self._start

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the metrics."""
        self.metrics = dict(checkpoint.get(METRICS, {}))


class Recipes(Callback):
    """Saves the config, and how each net was made, as plain values.

    Args:
        cfg: the composed config.
        nets: by the name of the net in the module, its ``_target_`` and arguments.
    """

    def __init__(self, cfg: DictConfig, nets: dict[str, dict[str, Any]]) -> None:
        self.config = OmegaConf.to_container(cfg, resolve=True)
        self.nets = nets

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add both to a checkpoint."""
        checkpoint[CONFIG], checkpoint[NETS] = self.config, self.nets
