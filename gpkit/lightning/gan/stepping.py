"""Optimiser steps of several nets under manual optimisation, mixed precision and DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from gpkit.autodiff.sharding.gathering import reshard
from gpkit.lightning.compat import scaler_of

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


def default_adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return Adam with the learning rate and betas of Gulrajani et al. (2017), arXiv:1704.00028."""
    return torch.optim.Adam(parameters, lr=1e-4, betas=(0.0, 0.9))


def configured(
    net: nn.Module, make_optimizer: MakeOptimizer | None, make_scheduler: MakeScheduler | None
) -> dict[str, Any]:
    """Return the optimiser and scheduler of one net, as ``configure_optimizers`` returns them."""
    optimizer = (make_optimizer or default_adam)([p for p in net.parameters() if p.requires_grad])
    if make_scheduler is None:
        return {"optimizer": optimizer}
    scheduler = {"scheduler": make_scheduler(optimizer), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


@contextmanager
def clipped(optimizer: LightningOptimizer, bound: float | None) -> Iterator[None]:
    """Bound the norm of the gradient of each step within the block.

    It is done by the optimiser, since a gradient scaler has unscaled the gradient only there.
    """

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, float(bound or 0))

    if bound is None:
        yield
        return
    handle = optimizer.optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        handle.remove()


def step_schedulers(module: pl.LightningModule, interval: str, optimizer: Any = None) -> None:
    """Step the learning-rate schedulers with an interval, "step" or "epoch".

    Args:
        module: the LightningModule.
        interval: of the schedulers.
        optimizer: whose schedulers are meant; None is every one.

    Raises:
        TypeError: if one of them needs a metric.
        ValueError: if one has a frequency.
    """
    for config in module.trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if config.interval != interval or optimizer not in (None, scheduler.optimizer):
            continue
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise TypeError(
                f"GANModule steps schedulers without a metric; got {type(scheduler).__name__}: "
                "step it in a hook of your own, and do not return it from configure_optimizers"
            )
        if config.frequency != 1:
            raise ValueError(
                "GANModule steps schedulers at every step or epoch; got frequency="
                f"{config.frequency}: use a scheduler that changes the rate more rarely"
            )
        scheduler.step()


def accumulate_gradients(
    module: pl.LightningModule,
    optimizer: LightningOptimizer,
    function: Callable[[Any], Tensor | None],
    window: list[Any],
    *,
    fill: bool = False,
) -> bool:
    """Set ``.grad`` to the gradient of the mean of a function over the micro-batches of a step.

    Args:
        module: whose precision scales the gradient.
        optimizer: of the parameters. Their gradients are set to None first.
        function: micro-batch -> one number, or None if there is nothing to train on.
        window: the micro-batches of one step.
        fill: whether trained parameters that the function does not reach get a gradient of zero,
            so that the optimiser steps them too.

    Returns:
        Whether there is a gradient.
    """
    optimizer.zero_grad()
    found = False
    for micro in window:
        total = function(micro)
        if total is not None and total.requires_grad:
            _backward(module, total / len(window))
            found = True
    if found and fill:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
    return found


def _backward(module: pl.LightningModule, total: Tensor) -> None:
    """Add the gradient of a number to ``.grad`` on this process, times the gradient scale."""
    # Without sync: DDP's reducer waits for every parameter of the module, and a step has several
    # backward passes. `average_gradients` does it once.
    strategy = module.trainer.strategy
    block: Callable[[], AbstractContextManager[None]]
    block = getattr(strategy, "block_backward_sync", nullcontext)
    with block():
        module.manual_backward(total)


def step_optimizer(
    module: pl.LightningModule,
    optimizer: LightningOptimizer,
    net: nn.Module,
    clip: float | None = None,
) -> None:
    """Average the gradients over the processes, and step the optimiser and its scheduler.

    Args:
        module: the LightningModule.
        optimizer: of the parameters of ``net``.
        net: the net that is trained.
        clip: bound of the absolute value of every trained weight after the step; None is no bound.
    """
    reshard(net)
    average_gradients(net.parameters())
    scaler = scaler_of(module.trainer)
    before = 0.0 if scaler is None else scaler.get_scale()
    optimizer.step()
    if clip is not None:
        with torch.no_grad():
            for p in filter(lambda p: p.requires_grad, net.parameters()):
                p.clamp_(-clip, clip)
    if scaler is not None and scaler.get_scale() < before:
        return  # the gradients overflowed and the step was skipped
    step_schedulers(module, "step", optimizer.optimizer)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every ``.grad`` by its mean over all ranks. With one process it does nothing.

    It is called once before each optimiser step, with the parameters of that optimiser. Unlike
    `DistributedDataParallel` it need not know which of them the loss depends on: a penalty does not
    depend on the last bias, and the critic's loss not on the generator. A missing gradient counts
    as zero, and stays missing if it is missing on all ranks. Those of parameters that FSDP2 has
    sharded are means already.

    Args:
        parameters: in the same order on all ranks.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    if world == 1:
        return
    trained = [p for p in parameters if p.requires_grad and not hasattr(p, "full_tensor")]
    for dtype in dict.fromkeys(p.dtype for p in trained):
        group = [p for p in trained if p.dtype == dtype]
        present = group[0].new_tensor([p.grad is not None for p in group])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([present, *(g.reshape(-1) for g in grads)]) / world
        torch.distributed.all_reduce(flat)
        found, *means = flat.split([len(group), *(p.numel() for p in group)])
        for i, (p, mean) in enumerate(zip(group, means, strict=True)):
            if p.grad is not None:
                p.grad.copy_(mean.view_as(p))
            elif found[i] > 0:
                p.grad = mean.view_as(p).clone()
