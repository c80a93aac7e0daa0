"""One step of one of several optimisers, under any precision and any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from gpkit.lightning.compat import scaler_of


def require_support(trainer: pl.Trainer, *, simultaneous: bool) -> None:
    """Refuse a trainer under which gradients would be wrong.

    Args:
        trainer: which is about to fit.
        simultaneous: whether several optimisers' gradients wait for their steps together.

    Raises:
        RuntimeError: if its strategy shards nets, or fixes their graph, or if a scaler would be
            updated between two steps of one backward.
    """
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise RuntimeError(
            "GANModule trains on one device or under DDP; got "
            f"{type(trainer.strategy).__name__}: use strategy='ddp'"
        )
    if getattr(trainer.model, "static_graph", False):
        raise RuntimeError(
            "GANModule has another graph at a step of the critic than at one of the generator; got "
            "DDPStrategy(static_graph=True): leave static_graph out"
        )
    if simultaneous and scaler_of(trainer) is not None:
        raise RuntimeError(
            "`simultaneous=True` has one scale for two steps, and precision='16-mixed' changes it "
            "in between: use precision='bf16-mixed' or 32"
        )


def backward(module: pl.LightningModule, total: Tensor) -> None:
    """Add the gradient of one number to this process's ``.grad``, scaled as the precision asks."""
    # The reducer of DDP would wait for every parameter, and there are several backwards a step.
    strategy = module.trainer.strategy
    block: Callable[[], AbstractContextManager[None]]
    block = getattr(strategy, "block_backward_sync", nullcontext)
    with block():
        module.manual_backward(total)


def step(module: pl.LightningModule, optimizer: LightningOptimizer, net: nn.Module) -> None:
    """Average the gradient over the processes, step, and step the optimiser's scheduler.

    Args:
        module: whose trainer it is.
        optimizer: of the parameters of ``net``.
        net: what is trained.
    """
    average_gradients(net.parameters())
    amp = scaler_of(module.trainer)
    before = 0.0 if amp is None else amp.get_scale()
    optimizer.step()
    if amp is not None and amp.get_scale() < before:
        return  # an overflow: the parameters are as they were
    for config in module.trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if scheduler.optimizer is optimizer.optimizer:
            scheduler.step()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every ``.grad`` by its mean over all ranks; alone, leave it.

    It is called once before an optimiser's step, with the parameters of that optimiser. So it does
    not matter which of them a loss has reached, which `DistributedDataParallel` must know: a
    penalty reaches no last bias, and a critic's step no generator. A gradient that is missing
    counts as zero, and stays missing where no rank has it.

    Args:
        parameters: in the same order on all ranks.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    if world == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
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
