"""A forward pass of a penalty's own that leaves no trace in training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def isolated(modules: list[nn.Module], seed: int, device: torch.device) -> Iterator[None]:
    """Run a forward whose buffers and random numbers are its own, and that can be differentiated.

    Batch statistics (every buffer of ``modules``) are written to copies; dropout draws from
    ``seed`` and the streams of ``device`` and the CPU are given back; attention and recurrent nets
    use kernels that have a double backward.

    Args:
        modules: the modules that the forward runs.
        seed: for the random numbers of this forward.
        device: where it runs.

    Yields:
        Nothing.
    """
    cuda = [device.index or 0] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        for module in modules:
            stack.enter_context(own_buffers(module))
        stack.enter_context(double_backward(modules))
        yield


@contextmanager
def own_buffers(module: nn.Module) -> Iterator[None]:
    """Give ``module`` copies of its buffers to write to, and the originals back at the end.

    The originals are put back as objects and never written to: a copy back would spoil graphs
    that have saved them.
    """
    originals = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        for owner, name, buffer in originals:
            owner._buffers[name] = buffer.clone()
        yield
    finally:
        for owner, name, buffer in originals:
            owner._buffers[name] = buffer


@contextmanager
def double_backward(modules: list[nn.Module]) -> Iterator[None]:
    """Choose kernels that have a double backward.

    Fused attention has none (the math kernel has); cuDNN's recurrent nets have none (torch's own
    have), and cuDNN is left alone where there are no recurrent nets.
    """
    recurrent = any(isinstance(m, nn.RNNBase) for module in modules for m in module.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a callable runs, as far as it shows them.

    They are the callable itself, the owner of a method, the function and arguments of a partial,
    and what a function refers to in its closure, as a global or as a default.
    """
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
        return [m for f in held if callable(f) for m in modules_of(f)]
    owner = getattr(function, "__self__", None)
    found = [owner] if isinstance(owner, nn.Module) else []
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        seen = inspect.getclosurevars(function)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        values = [*seen.nonlocals.values(), *seen.globals.values(), *defaults]
        found += [value for value in values if isinstance(value, nn.Module)]
    return found
