"""Checkpoints: written as a whole, and checked before a run goes on from one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from gpkit.app.build import PAIR
from gpkit.app.result import SHOWN, flattened


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it, and then replaces the old one.

    A run that is killed while it writes, or a full disk, leaves the old checkpoint as it was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; ``storage_options`` must be None.

        Raises:
            OSError: if it cannot be written, as on a full disk.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except (OSError, RuntimeError) as error:  # torch has errors of its own for a full disk
            kept = "; the one before is kept" if path.is_file() else ""
            raise OSError(f"cannot write the checkpoint {path}: {error}{kept}") from error
        finally:
            for left in path.parent.glob(f".{path.name}.*"):  # also by a run that was killed here
                left.unlink(missing_ok=True)


class Checkpoints(ModelCheckpoint):
    """Checkpoints that keep the best score of a resumed run, though the folder is a new one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from another folder, if its best checkpoint still exists."""
        if Path(state_dict["best_model_path"]).is_file():
            state_dict = {**state_dict, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)


# What a run adds to its checkpoints: see callbacks/state.py.
RANDOM, METRICS, SECONDS = "gpkit_random", "gpkit_metrics", "gpkit_seconds"
CONFIG, NETS = "gpkit_config", "gpkit_nets"
# Options whose effect is in the state that a checkpoint restores.
STATEFUL = (
    "optimizer",
    "scheduler",
    *(f"module.{net}_{what}" for net in PAIR for what in ("optimizer", "scheduler")),
)
# Options that a run that goes on may well have changed.
OWN = (*SHOWN, "ckpt_path", "trainer", "device", "callbacks", "debug", "task", "test_checkpoint")


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Args:
        steps: the step from which on it logs.
        seconds: the wall time that it has taken so far.
        changed: the options that differ from those of the checkpoint, in words.
    """

    steps: int = 0
    seconds: float = 0.0
    changed: tuple[str, ...] = ()


def require_checkpoint(
    path: Path, module: pl.LightningModule, cfg: DictConfig, *, trains: bool, ended: bool
) -> Start:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        path: of the checkpoint.
        module: that is trained.
        cfg: the composed config.
        trains: whether the run trains.
        ended: whether the training may have ended, so that only the test is left.

    Returns:
        Where the run goes on.

    Raises:
        ValueError: if the file is no checkpoint, or one of another net or optimiser, or of a run
            that has ended, or if options have no effect since the checkpoint has a state.
    """
    saved = read_checkpoint(path)
    _require_weights(path, saved["state_dict"], module.state_dict())
    if not trains:
        return Start()
    _require_optimizers(path, saved.get("optimizer_states", []), module)
    changed = _changed(saved.get(CONFIG), cfg)
    _require_state(path, changed)
    done = _epochs_done(saved["loops"]["fit_loop"])
    if done >= cfg.trainer.max_epochs and not ended:
        raise ValueError(
            f"ckpt_path={path} has {done} of {cfg.trainer.max_epochs} epochs: set "
            "trainer.max_epochs to more"
        )
    steps = int(saved["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])
    words = tuple(f"{k} was {there} and is {here}" for k, (there, here) in changed.items())
    return Start(steps, float(saved.get(SECONDS, 0.0)), words)


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


def _changed(saved: Mapping[str, Any] | None, cfg: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ from those of a checkpoint, as (there, here)."""
    if saved is None:
        return {}
    own = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(own, dict)
    there, here = (
        flattened({str(k): v for k, v in each.items() if k not in OWN}) for each in (saved, own)
    )
    return {
        key: (there.get(key, "unset"), here.get(key, "unset"))
        for key in {**there, **here}
        if there.get(key, "unset") != here.get(key, "unset")
    }


def _require_state(path: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse options that the state of the checkpoint would silently undo."""
    schedule = changed.get("scheduler._target_", ("", ""))
    for key, (there, here) in changed.items():
        if not key.startswith(STATEFUL) or (key.startswith("scheduler") and None in schedule):
            continue
        advice = "leave it as it was"
        if key.startswith("scheduler"):
            advice = "give the options of then, trainer.max_epochs too, or scheduler=none"
        raise ValueError(
            f"ckpt_path={path} holds the state of a run whose {key} was {there}: {here} would "
            f"have no effect; {advice}"
        )


def _epochs_done(fit_loop: dict[str, Any]) -> int:
    epochs = fit_loop["epoch_progress"]["current"]
    at_its_end = fit_loop["epoch_loop.batch_progress"]["is_last_batch"]
    return int(epochs["processed"] if at_its_end else epochs["completed"])


def _others(path: Path) -> str:
    """Return which other checkpoints are in the folder."""
    found = sorted(p.name for p in path.parent.glob("*.ckpt") if p.name != path.name)
    return f"; beside it there are {', '.join(found)}" if found else ""
