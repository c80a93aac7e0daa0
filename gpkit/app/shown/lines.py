"""What a run prints: what it is at its start, and its results at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from gpkit.app.checkpoints import Start
from gpkit.app.data import sizes


@rank_zero_only
def say_what_runs(cfg: DictConfig, module: Any, trainer: Any, data: Any) -> None:
    """Print the nets, the data, the penalty, the device and the length of a run."""
    rows = {
        "model": " and ".join(map(describe, nets_of(module))),
        "data": f"{type(data).__name__}, {sizes(data)}",
        "penalty": penalty_in_words(module),
        "device": f"{type(trainer.accelerator).__name__.removesuffix('Accelerator')}, "
        f"{processes(trainer.world_size)}, {trainer.precision}",
        "run": length(cfg),
    }
    print()
    for name, text in rows.items():
        print(f"  {name:<8} {text}")
    print()


def processes(count: int) -> str:
    """Return a number of processes, in words.

    >>> processes(1), processes(2)
    ('1 process', '2 processes, each with batches of its own')
    """
    return "1 process" if count == 1 else f"{count} processes, each with batches of its own"


def length(cfg: DictConfig) -> str:
    """Return how long a run trains, in words; or which checkpoint it looks at, without training."""
    if cfg.task != "train":
        return f"{cfg.task} of {cfg.ckpt_path}, no training, seed {cfg.seed}"
    epochs, steps = int(cfg.trainer.max_epochs), int(cfg.total_steps)
    plural = "s" * (epochs != 1), "s" * (steps != 1)
    return f"{epochs} epoch{plural[0]}, {steps:,} step{plural[1]}, seed {cfg.seed}"


@rank_zero_only
def say_start(path: Path | None, start: Start) -> None:
    """Print the options that differ from those of the checkpoint that a run goes on from."""
    if start.changed:
        print(f"  goes on from {path} with other options: {'; '.join(start.changed)}\n")


def nets_of(module: Any) -> list[nn.Module]:
    """Return the nets that are trained: one, or a generator and a critic."""
    return [getattr(module, n) for n in ("generator", "critic", "net") if hasattr(module, n)]


def describe(net: nn.Module) -> str:
    """Return the class of a net, and how many parameters it trains.

    >>> describe(nn.Linear(2, 3))
    'Linear with 9 parameters'
    """
    return f"{type(net).__name__} with {count_parameters(net):,} parameters"


def count_parameters(net: nn.Module) -> int:
    """Return how many numbers of a net are trained."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def penalty_in_words(module: Any) -> str:
    """Return each penalty with its weight."""
    parts = [f"{name}, weight {penalty.weight}" for name, penalty in module.penalties.items()]
    return "; ".join(parts) or "none"


def results(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that sum up a run: of the test, or else of validation; and of a GAN.

    >>> results({"train/loss": 0.1, "val/loss": 0.2}), results({"val/loss": 0.2, "test/acc": 1.0})
    ({'val/loss': 0.2}, {'test/acc': 1.0})
    """
    stages = [s for s in ("test/", "val/", "train/") if any(k.startswith(s) for k in metrics)]
    shown = (*stages[:1], "modes/", "wasserstein/", "critic_optimality", "dirac/distance")
    return {k: v for k, v in metrics.items() if k.startswith(shown) or k == "slope/interpolates"}


@rank_zero_only
def say_results(
    folder: Path, metrics: dict[str, float], tested: str, overrides: Sequence[str]
) -> None:
    """Print the results of a run, which checkpoint was tested, and where its files are."""
    shown = results(metrics)
    width = max(24, *map(len, shown)) if shown else 0
    print()
    for name, value in shown.items():
        vanishes = 0 < abs(value) < 1e-3
        print(f"  {name:<{width}} {value:{'.3g' if vanishes else '.4f'}}")
    print()
    lines = {
        "options": " ".join(overrides) if overrides else "",
        "tested": tested,
        "metrics": folder / "metrics.json",
        "checkpoints": folder / "checkpoints" if (folder / "checkpoints").is_dir() else "",
        "figures": folder / "figures" if (folder / "figures").is_dir() else "",
        "TensorBoard": f"tensorboard --logdir {folder}" if any(folder.glob("events.*")) else "",
    }
    for name, text in lines.items():
        if text:
            print(f"  {name:<12} {text}")
