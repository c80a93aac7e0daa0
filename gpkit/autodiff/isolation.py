"""A forward pass of a penalty's own that leaves no trace in training."""

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
    """Run a forward whose buffers and random numbers are its own, and that can be differentiated.

    Batch statistics, and whatever else the modules that run keep in buffers, are written to copies;
    dropout draws from ``seed``, and the streams of ``device`` and of the CPU are given back;
    attention, recurrent nets and norm layers use kernels that have the derivatives.

    Args:
        function: what will be called, or a module that it runs. Modules that it calls are seen as
            they are called.
        seed: for the random numbers of this forward, or the state to draw them from.
        device: where it runs.
        order: k, of the penalty.
        twice: whether it will be differentiated twice. If not, any kernel will do.

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
    """Give modules copies of their buffers to write to, and the originals back at the end.

    The originals are put back as objects and never written to: a copy back would spoil graphs
    that have saved them. Modules are seen as they are called; but where the function names a
    compiled one, whose trace would take in what looks on, those are taken that it names.
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
            # functional_call may have put its own tensor there, and the original back itself.
            if buffers_of(module).get(name) is copy:
                buffers_of(module)[name] = original


def named_modules(function: Any) -> list[nn.Module]:
    """Return the modules that a function is, is a method of, or names from outside."""
    if isinstance(function, functools.partial):
        named = [function.func, *function.args, *function.keywords.values()]
        return [m for part in named for m in named_modules(part)]
    found = [function, getattr(function, "__self__", None)]
    if inspect.isfunction(function):
        outside = inspect.getclosurevars(function)
        found += [*outside.nonlocals.values(), *outside.globals.values()]
    return [m for m in found if isinstance(m, nn.Module)]
