"""What a step costs with its penalties, in steps without: measured at the end of a training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

from gpkit.autodiff.random import seeded
from gpkit.lightning.module import PenalizedModule
from gpkit.penalty import Penalty

SECONDS = 0.5  # after which no more rounds are timed
ROUNDS = 15


class StepCost(Callback):
    """Times a step with and without penalties, on the last batch of a training.

    It is left out with several processes, which would wait for each other, and for modules other
    than `PenalizedModule`.

    Attributes:
        plain_steps: the time with penalties, divided by the time without; None without a training.
    """

    def __init__(self) -> None:
        self.plain_steps: float | None = None
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch."""
        self._batch = batch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure."""
        alone = trainer.world_size == 1 and type(pl_module) is PenalizedModule
        if alone and self._batch is not None:
            with trainer.precision_plugin.train_step_context():
                self.plain_steps = plain_steps(pl_module, self._batch, trainer.global_step)
        self._batch = None


def plain_steps(module: PenalizedModule, batch: Any, step: int) -> float:
    """Return the time of the forward and backward passes of a step, in those without penalties.

    A penalty that acts on every k-th step counts with 1/k of what it adds. The state of the module
    and of its penalties, and torch's random numbers, stay as they are.

    Args:
        module: the module.
        batch: of its training data.
        step: the optimiser step, for the schedules of the penalties.

    Returns:
        1 + Σ_k (t_k / t - 1) / k, where t is the time without penalties (on the CPU that of the
        process, which other programs do not lengthen), and t_k that with those
        penalties that act on every k-th step: each the fastest of interleaved steps, since a step
        is never faster than its work, and often slower.
    """
    lazy: dict[int, dict[str, Penalty]] = {}
    for name, penalty in module.penalties.items():
        lazy.setdefault(penalty.every, {})[name] = penalty
    saved = module.penalties.state_dict()
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    make = partial(
        PenalizedModule, module.net, module.loss, inputs=module.inputs, target=module.target
    )
    with warnings.catch_warnings(), seeded(0, module.device):
        warnings.simplefilter("ignore")  # they have been shown
        timed = {0: make(), **{k: make(own) for k, own in lazy.items()}}
        seconds: dict[int, list[float]] = {k: [] for k in timed}
        start = time.perf_counter()
        for i in range(ROUNDS + 1):
            for every, each in timed.items():
                for penalty in lazy.get(every, {}).values():
                    penalty.step = step - step % every
                took = _seconds(each, batch)
                seconds[every] += [took] if i else []  # the first one warms up
            if i and time.perf_counter() - start > SECONDS:
                break
    module.penalties.load_state_dict(saved)
    _restore(module, buffers)
    fastest = {k: min(each) for k, each in seconds.items()}
    return 1 + sum((fastest[k] / fastest[0] - 1) / k for k in lazy)


def _seconds(module: PenalizedModule, batch: Any) -> float:
    """Return the time of the forward and backward passes of a step."""
    start = _now(module.device)
    module.penalized_loss(batch).backward()
    took = _now(module.device) - start
    module.zero_grad(set_to_none=True)
    return took


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def _restore(module: torch.nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
