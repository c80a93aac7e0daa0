"""What a run prints: what it is at its start, and its results at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from gpkit.app.data import sizes


@rank_zero_only
def say_what_runs(cfg: DictConfig, module: Any, trainer: Any, data: Any) -> None:
    """Print the nets, the data, the penalty, the device and the length of a run."""
    rows = {
        "model": " and ".join(map(describe, nets_of(module))),
        "data": f"{type(data).__name__}, {sizes(data)}",
        "penalty": penalty_in_words(module),
        "device": f"{type(trainer.accelerator).__name__.removesuffix('Accelerator')}, "
        f"{trainer.world_size} process{'es' * (trainer.world_size > 1)}, {trainer.precision}",
        "run": f"{cfg.trainer.max_epochs} epochs, {cfg.total_steps:,} steps, seed {cfg.seed}",
    }
    print()
    for name, text in rows.items():
        print(f"  {name:<8} {text}")
    print()


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
    """Return the metrics that sum up a run: of the test, and of a GAN."""
    shown = ("test/", "modes/", "wasserstein/", "critic_optimality", "dirac/distance")
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
