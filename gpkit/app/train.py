"""Run one job: from a config to metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger

from gpkit.app.build import (
    build_callbacks,
    build_loggers,
    build_module,
    check_nets,
    recipes,
    trains_pair,
)
from gpkit.app.callbacks.bar import Bar
from gpkit.app.callbacks.cost import StepCost
from gpkit.app.callbacks.guard import FiniteGuard, require_finite_test
from gpkit.app.callbacks.interrupts import StopAtSignal
from gpkit.app.callbacks.state import Progress, RandomStates, Recipes
from gpkit.app.checkpoints import Checkpoints, Start, WholeFiles, require_checkpoint
from gpkit.app.data import batches_of, build_data, loader_of, loader_of_task
from gpkit.app.examine import require_fit
from gpkit.app.overrides import CONFIG_DIR, check_types, explain, set_keys
from gpkit.app.result import LAST, Result, finite, recorded, write_json
from gpkit.app.settings import RequireMetric, check_values, count_processes, quiet
from gpkit.app.shown.lines import count_parameters, nets_of, say_results, say_start, say_what_runs
from gpkit.app.shown.logs import log_result, log_start
from gpkit.app.sweep import describe


def train(overrides: Sequence[str] = (), output_dir: str | Path | None = None) -> dict[str, float]:
    """Train from Python, as ``python train.py`` does from a shell.

    Args:
        overrides: the arguments of the command line: ``["model=mlp", "penalty.weight=0.1"]``.
        output_dir: the run's folder; None makes a new one in ``outputs/``.

    Returns:
        The final metrics by name, such as ``test/acc``; ``metrics.json`` has the same.

    Raises:
        TypeError: if ``overrides`` is no list of strings, or a value has another type than its
            default.
        ValueError: if an override does not fit the config; the message is the shell's.
    """
    if isinstance(overrides, str) or not all(isinstance(o, str) for o in overrides):
        raise TypeError(
            f'`gpkit.train(overrides)` takes a list of strings, as ["model=mlp", "seed=1"]; got '
            f"{overrides!r}"
        )
    if output_dir is None:
        output_dir = Path("outputs", datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f"))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="train"):
        try:
            cfg = compose("train", list(overrides), return_hydra_config=True)
        except Exception as error:
            raise ValueError(explain(error, list(overrides))) from error
        choices = cfg.hydra.runtime.choices
        with open_dict(cfg):
            del cfg["hydra"]
        check_types(cfg, list(overrides))
        result = describe(cfg, overrides, choices)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    with recorded(result, folder, lambda error: explain(error, overrides)):
        return run(cfg, folder, overrides, sweep=True, result=result)


def run(
    cfg: DictConfig,
    output_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    sweep: bool = False,
    result: Result | None = None,
    resume: Path | None = None,
) -> dict[str, float]:
    """Train and test, or do one task with a checkpoint, and write the results.

    Args:
        cfg: the composed config.
        output_dir: the folder for the events, ``checkpoints/`` and ``metrics.json``.
        overrides: the options that the user set. A net of the user's own must take these, but need
            not take the others.
        sweep: whether more jobs follow in this process.
        result: gets the metrics, and what was measured.
        resume: a checkpoint of this very run, which was stopped, maybe after its last epoch.

    Returns:
        The final metrics by name.

    Raises:
        ValueError: if a value is out of its range.
        FileNotFoundError: if ``ckpt_path`` does not exist.
        ArithmeticError: if a loss, a penalty or a gradient is not finite.
    """
    check_values(cfg)
    quiet()
    folder = Path(output_dir)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    check_nets(cfg)
    data = build_data(cfg, set_keys(overrides))
    cfg.run_dir, cfg.total_steps = str(folder), count_steps(cfg, batches_of(cfg, data))
    callbacks = build_callbacks(cfg)
    module = build_module(cfg, data, set_keys(overrides))
    require_fit(module, data)
    loader = loader_of_task(cfg, data)
    validates = loader_of(data, "val") is not None and cfg.trainer.get("limit_val_batches") != 0
    has_best = validates and not trains_pair(cfg)  # a pair has no val/loss
    path = resume or (None if cfg.ckpt_path is None else Path(cfg.ckpt_path))
    trains, start = cfg.task == "train", Start()
    if path is not None:
        start = require_checkpoint(path, module, cfg, trains=trains, ended=resume is not None)
    if result is not None:
        result.earlier_seconds = start.seconds
    progress = Progress(start.seconds)
    callbacks += [
        FiniteGuard(),
        RandomStates(),
        progress,
        Recipes(cfg, recipes(cfg, data, set_keys(overrides))),
    ]
    callbacks += [StopAtSignal(folder / LAST, overrides)]
    cost = StepCost()
    if not cfg.module.get("compile"):  # a compiled loss would be compiled again
        callbacks.append(cost)
    if has_best or cfg.optimized_metric != "val/loss":  # the default is for any data
        callbacks.append(RequireMetric(cfg.optimized_metric))
    logged = trains and any(folder.glob("events.*"))  # by a run that was stopped
    loggers = build_loggers(cfg.logger, start.steps if logged else None)
    trainer = build_trainer(cfg, folder, callbacks, loggers, has_best=has_best, sweep=sweep)
    say_what_runs(cfg, module, trainer, data)
    say_start(path, start)
    for logger in trainer.loggers if trainer.is_global_zero else ():
        log_start(logger, cfg, pair=trains_pair(cfg))
    if cfg.task == "predict":
        return predict(trainer, module, loader, cfg.ckpt_path, folder)
    metrics: dict[str, Any] = {}
    tested = cfg.ckpt_path
    if trains:
        trainer.fit(module, datamodule=data, ckpt_path=path)
        metrics |= progress.metrics | trainer.callback_metrics
        checkpoint = trainer.checkpoint_callback
        best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        tested = best if cfg.test_checkpoint == "best" and best else None
    if loader is not None:
        metrics |= trainer.test(module, datamodule=data, ckpt_path=tested, verbose=False)[0]
    final = {name: float(value) for name, value in sorted(metrics.items())}
    tested = None if loader is None else str(tested or "the weights of the last step")
    if result is not None:
        result.metrics, result.tested = finite(final), tested
        result.cost_in_plain_steps = cost.plain_steps
        result.parameters = sum(map(count_parameters, nets_of(module)))
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            log_result(logger, cfg, final, trainer.fit_loop.total_batch_idx)
        write_metrics(folder, final)
        say_results(folder, final, tested or "", overrides)
    require_finite_test(final)
    return final


def predict(
    trainer: pl.Trainer, module: Any, loader: Any, path: str, folder: Path
) -> dict[str, Any]:
    """Write the outputs of a checkpoint for the samples of a loader to ``predictions.pt``.

    Returns:
        No metrics.
    """
    outputs = trainer.predict(module, loader, ckpt_path=path)
    torch.save(torch.cat(cast(list[Any], outputs)), folder / "predictions.pt")
    print(f"\n  predictions  {folder / 'predictions.pt'}")
    return {}


def count_steps(cfg: DictConfig, batches: int) -> int:
    """Return the number of optimiser steps of a run; of the critic, for a generator and a critic.

    Args:
        cfg: the composed config.
        batches: the number of batches of an epoch, of all processes.
    """
    batches = math.ceil(batches / count_processes(cfg))  # each has a part of them
    limit = cfg.trainer.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    each = cfg.module.get("accumulate", 1) * cfg.trainer.accumulate_grad_batches
    steps = max(1, math.ceil(batches / each) * cfg.trainer.max_epochs)
    most = cfg.trainer.get("max_steps", -1)  # of a pair, Lightning counts those of both nets
    return steps if most < 0 or trains_pair(cfg) else min(steps, most)


def build_trainer(
    cfg: DictConfig,
    folder: Path,
    callbacks: list[Callback],
    loggers: list[Logger] | bool,
    *,
    has_best: bool,
    sweep: bool,
) -> pl.Trainer:
    """Return the trainer, which writes into the run's folder.

    Args:
        cfg: the composed config.
        folder: the run's folder.
        callbacks: those of the config and of the run.
        loggers: of the run; False for none.
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
    callbacks = [*([best, last] if has_best else [last]), *callbacks]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(Bar(leave=False))
    return instantiate(
        cfg.trainer,
        _convert_="all",
        **device,
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeFiles()],
        default_root_dir=str(folder),
    )


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Write metrics.json. NaN and infinities, which JSON does not have, become null."""
    write_json(folder / "metrics.json", finite(metrics))
