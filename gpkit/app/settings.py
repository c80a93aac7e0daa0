"""What is checked and set before a run."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from gpkit import checks
from gpkit.app.result import LAST

TASKS = ("train", "test", "predict")


def check_values(cfg: DictConfig) -> None:
    """Refuse values that nothing else checks before the first step."""
    if checks.integer("seed", cfg.seed, 0) >= 2**32:
        raise ValueError(f"`seed` must be an integer in [0, 2**32); got {cfg.seed}")
    checks.choice("test_checkpoint", cfg.test_checkpoint, ("best", "last"))
    checks.integer("trainer.max_epochs", cfg.trainer.max_epochs, 1)
    checks.integer("trainer.log_every_n_steps", cfg.trainer.log_every_n_steps, 1)
    checks.integer("trainer.accumulate_grad_batches", cfg.trainer.accumulate_grad_batches, 1)
    if "lr" in cfg.optimizer:
        checks.number("optimizer.lr", cfg.optimizer.lr, 0)
    if cfg.device.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            "device=gpu needs a CUDA device; found none: use device=cpu or device=auto"
        )
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        below = [p for p in ("last.ckpt", LAST) if (Path(cfg.ckpt_path) / p).is_file()]
        raise FileNotFoundError(
            f"ckpt_path={cfg.ckpt_path} is a folder: give ckpt_path={cfg.ckpt_path}/{below[0]}"
            if below
            else f"ckpt_path={cfg.ckpt_path}: no such file; it is RUN/{LAST} of a run"
        )
    checks.choice("task", cfg.task, TASKS)
    if cfg.task != "train" and cfg.ckpt_path is None:
        raise ValueError(f"task={cfg.task} needs a checkpoint: ckpt_path=RUN/checkpoints/best.ckpt")
    if cfg.trainer.gradient_clip_val is not None:
        checks.number("trainer.gradient_clip_val", cfg.trainer.gradient_clip_val, 0)
    _check_devices(cfg.device)


def count_processes(cfg: DictConfig) -> int:
    """Return how many processes train: one for each device, on all nodes."""
    devices, nodes = cfg.device.devices, cfg.trainer.get("num_nodes", 1)
    if isinstance(devices, int) and devices > 0:
        return devices * nodes
    if OmegaConf.is_list(devices):
        return len(devices) * nodes
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    return (1 if cfg.device.accelerator == "cpu" else max(1, found)) * nodes


def _check_devices(device: DictConfig) -> None:
    """Refuse more processes on the CPU than it has cores: they would wait for each other."""
    on_cpu = device.accelerator == "cpu" or (
        device.accelerator == "auto" and not torch.accelerator.is_available()
    )
    cores = os.cpu_count() or 1
    if on_cpu and isinstance(device.devices, int) and device.devices > cores:
        raise ValueError(
            f"device.devices={device.devices} on the CPU starts as many processes, and it has "
            f"{cores} cores: use at most device.devices={cores}"
        )


class RequireMetric(Callback):
    """Refuses a metric for the sweeper that is not logged: when its stage has ended first.

    Args:
        name: of the metric, such as "val/loss".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stage = name.partition("/")[0]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Look for a metric of validation."""
        if self.stage == "val" and not trainer.sanity_checking:
            self._require(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look for a metric of training, or of a callback."""
        if self.stage not in ("val", "test"):
            self._require(trainer)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Look for a metric of the test."""
        if self.stage == "test":
            self._require(trainer)

    def _require(self, trainer: Any) -> None:
        found = trainer.callback_metrics
        if self.name not in found:
            raise ValueError(
                f"optimized_metric={self.name} is not logged{checks.nearest(self.name, found)}; "
                f"there are {', '.join(sorted(found))}"
            )


def quiet() -> None:
    """Hide messages of Lightning that a user cannot act on."""
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", ".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*'modes/.*sync_dist=True.*")  # rank zero alone counts them
    warnings.filterwarnings("ignore", ".*turning off the train dataloader shuffling for you.*")
    warnings.filterwarnings("ignore", "The dirpath has changed from .*")  # Checkpoints handles it
