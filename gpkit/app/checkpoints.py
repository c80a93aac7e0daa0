"""Checkpoints: written as a whole, with the random states, and checked before a run goes on."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from gpkit.autodiff.random import random_state, set_random_state


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it, and then replaces the old one.

    A run that is killed while it writes, or a full disk, leaves the old checkpoint as it was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; ``storage_options`` must be None."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


class Checkpoints(ModelCheckpoint):
    """Checkpoints that keep the best score of a resumed run, though the folder is a new one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from another folder, if its best checkpoint still exists."""
        if Path(state_dict["best_model_path"]).is_file():
            state_dict = {**state_dict, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)


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


class Metrics(Callback):
    """Saves the metrics so far, for a run that was stopped between its last epoch and its test.

    Attributes:
        metrics: those of the checkpoint that the run went on from.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the metrics as plain numbers."""
        checkpoint[METRICS] = {k: float(v) for k, v in trainer.callback_metrics.items()}

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


RANDOM, METRICS = "gpkit_random", "gpkit_metrics"
CONFIG, NETS = "gpkit_config", "gpkit_nets"


def require_checkpoint(path: Path, module: pl.LightningModule, max_epochs: int | None) -> int:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        path: of the checkpoint.
        module: that is trained.
        max_epochs: of the run; None if it does not train.

    Returns:
        The step from which on a run logs that goes on.

    Raises:
        ValueError: if the file is no checkpoint, or one of another net or optimiser, or of a run
            that has ended.
    """
    saved = read_checkpoint(path)
    _require_weights(path, saved["state_dict"], module.state_dict())
    steps = int(saved["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])
    if max_epochs is None:
        return steps
    _require_optimizers(path, saved.get("optimizer_states", []), module)
    done = _epochs_done(saved["loops"]["fit_loop"])
    if done >= max_epochs:
        raise ValueError(
            f"ckpt_path={path} has {done} of {max_epochs} epochs: set trainer.max_epochs to more"
        )
    return steps


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what is in a checkpoint of a run; nothing in it is executed.

    Raises:
        ValueError: if the file is damaged, or no checkpoint.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"ckpt_path={path}: no such file{_others(path)}") from None
    except Exception as error:  # torch raises five kinds of errors, for as many kinds of files
        raise ValueError(
            f"ckpt_path={path} is damaged, or no checkpoint: {str(error).splitlines()[0][:80]}"
            f"{_others(path)}"
        ) from error
    if not isinstance(saved, dict) or not {"state_dict", "epoch", "loops"} <= saved.keys():
        raise ValueError(
            f"ckpt_path={path} is a file of torch.save, but no checkpoint of a run{_others(path)}"
        )
    return saved


def _require_weights(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    shapes = {n: list(t.shape) for n, t in own.items()}
    other = {n: list(t.shape) for n, t in saved.items()}
    if shapes == other:
        return
    name = next(n for n in {**shapes, **other} if shapes.get(n) != other.get(n))
    raise ValueError(
        f"ckpt_path={path} is of another model: {name} is {other.get(name, 'missing')} there and "
        f"{shapes.get(name, 'missing')} here; give the same model, module and data options"
    )


def _require_optimizers(path: Path, saved: list[Any], module: pl.LightningModule) -> None:
    made: Any = module.configure_optimizers()
    each = made if isinstance(made, list) else [made]
    own = [o["optimizer"] if isinstance(o, dict) else o for o in each]
    for optimizer, state in zip(own, saved, strict=False):
        here, there = (set(g) for g in (optimizer.param_groups[0], state["param_groups"][0]))
        if here - {"initial_lr"} != there - {"initial_lr"}:
            raise ValueError(
                f"ckpt_path={path} has the state of another optimizer than "
                f"{type(optimizer).__name__}: the options differ in "
                f"{', '.join(sorted((here ^ there) - {'initial_lr'}))}"
            )


def _epochs_done(fit_loop: dict[str, Any]) -> int:
    epochs = fit_loop["epoch_progress"]["current"]
    at_its_end = fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    return int(epochs["processed"] if at_its_end else epochs["completed"])


def _others(path: Path) -> str:
    """Return which other checkpoints are in the folder."""
    found = sorted(p.name for p in path.parent.glob("*.ckpt") if p.name != path.name)
    return f"; beside it there are {', '.join(found)}" if found else ""
