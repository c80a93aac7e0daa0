"""Run an extra forward pass without side effects on training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkit.autodiff.compat import buffers_of, is_compiled
from gpkit.autodiff.kernels import double_backward
from gpkit.autodiff.random import RandomState, seeded


@contextmanager
def isolated(
    function: Any,
    seed: int | RandomState,
    device: torch.device,
    order: int = 1,
    *,
    twice: bool = True,
) -> Iterator[None]:
    """A context for a forward pass with its own buffers and random numbers, and a double backward.

    Modules write batch norm statistics and other buffers to copies. Dropout draws from ``seed``,
    and the random states of ``device`` and of the CPU are restored at the end. Attention,
    recurrent nets and norm layers use kernels that have the derivatives.

    Args:
        function: the function to be called, or a module that it runs. Other modules are found when
            they are called.
        seed: the seed of this forward pass, or a random state to start from.
        device: the device of the forward pass.
        order: k, the order of the penalty.
        twice: whether the graph will be differentiated twice. If not, any kernel is allowed.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, device))
        if twice:
            stack.enter_context(double_backward(order))
        stack.enter_context(own_buffers(function))
        yield


@contextmanager
def own_buffers(function: Any) -> Iterator[None]:
    """Let modules write to copies of their buffers, and put the originals back at the end.

    The original tensors are put back, and never written to, because graphs may have saved them. A
    global hook finds the modules when they are called. torch.compile would trace that hook, so for
    a function that refers to a compiled module only the modules that it refers to are handled.
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
            for name, buffer in buffers_of(owner).items():
                if buffer is not None:
                    swapped.append((owner, name, buffer, buffer.clone()))
                    buffers_of(owner)[name] = swapped[-1][-1]

    named = named_modules(function)
    compiled = any(is_compiled(m) for owner in named for m in owner.modules())
    hook = None if compiled else register_module_forward_pre_hook(swap)
    try:
        for owner in named if compiled else named[:1]:
            swap(owner)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for module, name, original, copy in swapped:
            # functional_call swaps in its own tensor, and puts the original back itself.
            if buffers_of(module).get(name) is copy:
                buffers_of(module)[name] = original


def named_modules(function: Any) -> list[nn.Module]:
    """Return the modules that a function is, is a method of, or refers to from its closure."""
    if isinstance(function, functools.partial):
        named = [function.func, *function.args, *function.keywords.values()]
        return [m for part in named for m in named_modules(part)]
    found = [function, getattr(function, "__self__", None)]
    if inspect.isfunction(function):
        outside = inspect.getclosurevars(function)
        found += [*outside.nonlocals.values(), *outside.globals.values()]
    return [m for m in found if isinstance(m, nn.Module)]
