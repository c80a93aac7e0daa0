"""A forward pass of a penalty's own that leaves no trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkit.norm_layers import elementary


@contextmanager
def isolated(function: Any, seed: int, device: torch.device, order: int = 1) -> Iterator[None]:
    """Run a forward whose buffers and random numbers are its own, and that can be differentiated.

    Batch statistics, and whatever else the modules that run keep in buffers, are written to copies;
    dropout draws from ``seed``, and the streams of ``device`` and of the CPU are given back;
    attention, recurrent nets and norm layers use kernels that have the derivatives.

    Args:
        function: what will be called, or a module that it runs. Modules that it calls are seen as
            they are called.
        seed: for the random numbers of this forward.
        device: where it runs.
        order: k, of the penalty.

    Yields:
        Nothing.
    """
    cuda = [device.index or 0] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        stack.enter_context(double_backward(order))
        stack.enter_context(own_buffers(function))
        yield


@contextmanager
def own_buffers(function: Any) -> Iterator[None]:
    """Give modules copies of their buffers to write to, and the originals back at the end.

    The originals are put back as objects and never written to: a copy back would spoil graphs
    that have saved them.
    """
    swapped: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    seen: set[nn.Module] = set()

    def swap(module: nn.Module, _: Any = None) -> None:
        if module in seen:
            return
        for owner in module.modules():
            if owner in seen:
                continue
            seen.add(owner)
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    swapped.append((owner, name, buffer, buffer.clone()))
                    owner._buffers[name] = swapped[-1][-1]

    hook = register_module_forward_pre_hook(swap)
    try:
        owner = getattr(function, "__self__", function)
        if isinstance(owner, nn.Module):
            swap(owner)
        yield
    finally:
        hook.remove()
        for module, name, original, copy in swapped:
            # functional_call may have put its own tensor there, and the original back itself.
            if module._buffers.get(name) is copy:
                module._buffers[name] = original


@contextmanager
def double_backward(order: int = 1) -> Iterator[None]:
    """Choose kernels that have a double backward, or the k + 1 that a penalty of order k needs.

    Fused attention has none (the math kernel has); cuDNN's recurrent nets have none (torch's own
    have), and cuDNN is left alone until there is a recurrent net. Fused layer norm and batch norm
    have a wrong third derivative: for order >= 2 they are computed in elementary operations.

    Args:
        order: k, of the penalty.

    Yields:
        Nothing.
    """
    cudnn = torch.backends.cudnn.enabled

    def without_cudnn(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.RNNBase):
            torch.backends.cudnn.enabled = False

    hook = register_module_forward_pre_hook(without_cudnn)
    try:
        with sdpa_kernel(SDPBackend.MATH), elementary() if order >= 2 else nullcontext():
            yield
    finally:
        hook.remove()
        torch.backends.cudnn.enabled = cudnn
