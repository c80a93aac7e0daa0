"""Gradients of one step, averaged over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


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
