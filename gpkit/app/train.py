"""Run one job: from a config to metrics."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from gpkit import checks
from gpkit.app.build import build_callbacks, build_module, trains_pair
from gpkit.app.checkpoints import Checkpoints, RandomStates, WholeFiles, require_checkpoint
from gpkit.app.guard import FiniteGuard
from gpkit.app.interrupts import StopAtSignal
from gpkit.app.overrides import CONFIG_DIR, check_types, set_keys


def train(overrides: Sequence[str] = (), output_dir: str | Path | None = None) -> dict[str, float]:
    """Train from Python, as ``python train.py`` does from a shell.

    Args:
        overrides: the arguments of the command line: ``["model=mlp", "penalty.weight=0.1"]``.
        output_dir: the run's folder; None makes a new one in ``outputs/``.

    Returns:
        The final metrics by name, such as ``test/acc``; ``metrics.json`` has the same.

    Raises:
        TypeError: if a value has another type than its default.
        Exception: Hydra's own, for an override that does not fit the config.
    """
    if output_dir is None:
        output_dir = Path("outputs", datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f"))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="train"):
        cfg = compose("train", list(overrides))
        check_types(cfg, list(overrides))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    return run(cfg, folder, overrides, sweep=True)


def run(
    cfg: DictConfig, output_dir: str | Path, overrides: Sequence[str] = (), *, sweep: bool = False
) -> dict[str, float]:
    """Train, test, and write the results.

    Args:
        cfg: the composed config.
        output_dir: the folder for the events, ``checkpoints/`` and ``metrics.json``.
        overrides: the options that the user set. A net of the user's own must take these, but need
            not take the others.
        sweep: whether more jobs follow in this process.

    Returns:
        The final metrics by name.

    Raises:
        ValueError: if a value is out of its range.
        FileNotFoundError: if ``ckpt_path`` does not exist.
    """
    _check_values(cfg)
    _quiet()
    folder = Path(output_dir)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    module = build_module(cfg, data, set_keys(overrides))
    has_best = bool(data.val_dataloader()) and not trains_pair(cfg)  # a pair has no val/loss
    if cfg.ckpt_path is not None:
        require_checkpoint(Path(cfg.ckpt_path), module, cfg.trainer.max_epochs)
    trainer = build_trainer(cfg, folder, overrides, has_best=has_best, sweep=sweep)
    trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path)
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    checkpoint = trainer.checkpoint_callback
    best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
    if data.test_dataloader():
        metrics |= trainer.test(
            module,
            datamodule=data,
            ckpt_path=best if cfg.test_checkpoint == "best" and best else None,
            verbose=False,
        )[0]
    final = {name: float(value) for name, value in sorted(metrics.items())}
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # A GAN logs some of these as curves: without a step they would get a point at 0.
                last = trainer.fit_loop.total_batch_idx
                logger.log_hyperparams(hyperparameters(cfg), results(final), step=last)
                logger.finalize("success")
        write_metrics(folder, final)
        _report(folder, final)
    return final


def build_trainer(
    cfg: DictConfig, folder: Path, overrides: Sequence[str], *, has_best: bool, sweep: bool
) -> pl.Trainer:
    """Return the trainer, which writes into the run's folder.

    Args:
        cfg: the composed config.
        folder: the run's folder.
        overrides: the options that the user set.
        has_best: whether there is a val/loss, which defines the best checkpoint.
        sweep: whether more jobs follow. Then ddp becomes ddp_spawn, since ddp runs the command
            again in each process.
    """
    device = {str(k): v for k, v in cfg.device.items()}
    if sweep and device["strategy"] == "ddp":
        device["strategy"] = "ddp_spawn"
    # One callback for each file: Lightning's save_last skips epochs that do not improve. A second
    # run in the same folder replaces the files.
    best = Checkpoints(
        folder / "checkpoints", "best", monitor="val/loss", enable_version_counter=False
    )
    last = ModelCheckpoint(folder / "checkpoints", "last", enable_version_counter=False)
    callbacks: list[Callback] = [best, last] if has_best else [last]
    callbacks += [FiniteGuard(), RandomStates()]
    callbacks.append(StopAtSignal(folder / "checkpoints/last.ckpt", overrides))
    callbacks += build_callbacks(cfg.callbacks)
    if cfg.trainer.enable_progress_bar and sys.stdout.isatty():
        callbacks.append(RichProgressBar(leave=False))
    return instantiate(
        cfg.trainer,
        _convert_="all",
        **device,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        callbacks=callbacks,
        plugins=[WholeFiles()],
        default_root_dir=str(folder),
    )


def hyperparameters(cfg: DictConfig) -> dict[str, Any]:
    """Return the config as plain values, without the parts that do not describe the model."""
    with open_dict(cfg):
        plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items() if k not in ("hydra", "ckpt_path", "trainer")}


def _check_values(cfg: DictConfig) -> None:
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
        raise FileNotFoundError(
            f"ckpt_path={cfg.ckpt_path}: no such file; it is RUN/checkpoints/last.ckpt of a run"
        )


def _quiet() -> None:
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
    warnings.filterwarnings("ignore", "The dirpath has changed from .*")  # Checkpoints handles it


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Write metrics.json. NaN and infinities, which JSON does not have, become null."""
    plain = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    (folder / "metrics.json").write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")


def results(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that sum up a run: of the test, and of a GAN."""
    shown = ("test/", "modes/", "wasserstein/", "critic_optimality", "dirac/distance")
    return {k: v for k, v in metrics.items() if k.startswith(shown) or k == "slope/interpolates"}


@rank_zero_only
def _report(folder: Path, metrics: dict[str, float]) -> None:
    """Print the results of the run, and where its files are."""
    shown = results(metrics)
    width = max(24, *map(len, shown)) if shown else 0
    print()
    for name, value in shown.items():
        vanishes = 0 < abs(value) < 1e-3
        print(f"  {name:<{width}} {value:{'.3g' if vanishes else '.4f'}}")
    print()
    print(f"  metrics      {folder / 'metrics.json'}")
    print(f"  checkpoints  {folder / 'checkpoints'}")
    if (folder / "figures").is_dir():
        print(f"  figures      {folder / 'figures'}")
    print(f"  TensorBoard  tensorboard --logdir {folder}")
