"""Run an extra forward pass without side effects, on kernels that have a double backward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkit.autodiff.compat import COMPILED_CLASS, attention_switch, buffers_of, compiled_call_of
from gpkit.autodiff.norm_layers import elementary
from gpkit.autodiff.random import RandomState, seeded

FORWARDS = ("isolated", "training", "eval")  # the ways to run a forward pass of a penalty


@contextmanager
def isolated(
    function: Any,
    seed: int | RandomState,
    device: torch.device,
    order: int = 1,
    *,
    twice: bool = True,
    evaluating: bool = False,
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
        evaluating: whether the modules are put in eval mode, and back in their own at the end.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, device))
        if twice:
            stack.enter_context(double_backward(order))
        stack.enter_context(own_buffers(function, evaluating=evaluating))
        yield


@contextmanager
def own_buffers(function: Any, *, evaluating: bool = False) -> Iterator[None]:
    """Let modules write to copies of their buffers, and put the originals back at the end.

    The original tensors are put back, and never written to, because graphs may have saved them.
    Modules that the function refers to get copies before it runs, and get their originals back even
    if the forward pass replaced a buffer. A global hook finds other modules when they are called.
    torch.compile would trace that hook, so it is left out if the function refers to a compiled
    module.

    Args:
        function: the function to be called, or a module that it runs.
        evaluating: whether the modules are put in eval mode meanwhile.

    Yields:
        Nothing.
    """
    trained: list[nn.Module] = []
    swapped: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    seen: set[nn.Module] = set()
    known = 0

    def swap(module: nn.Module, _: Any = None) -> None:
        if module in seen:
            return
        for owner in module.modules():
            if owner in seen:
                continue
            seen.add(owner)
            if evaluating and owner.training:
                trained.append(owner)
                owner.training = False
            for name, buffer in buffers_of(owner).items():
                if buffer is not None:
                    swapped.append((owner, name, buffer, buffer.clone()))
                    buffers_of(owner)[name] = swapped[-1][-1]

    named = named_modules(function)
    compiled = any(
        compiled_call_of(m) is not None or type(m).__name__ == COMPILED_CLASS
        for owner in named
        for m in owner.modules()
    )
    hook = None if compiled else register_module_forward_pre_hook(swap)
    try:
        for owner in named:
            swap(owner)
        known = len(swapped)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for owner in trained:
            owner.training = True
        for i, (module, name, original, copy) in enumerate(swapped):
            # For a module found by the hook, functional_call may have swapped in its own tensor
            # first: it puts the original back itself, and `original` is the swapped-in tensor.
            if i < known or buffers_of(module).get(name) is copy:
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


class double_backward:
    """A context in which kernels have the k + 1 derivatives that a penalty of order k needs.

    Fused attention has no double backward: the math kernel is used instead (entering is eight
    times cheaper than ``sdpa_kernel(SDPBackend.MATH)``). cuDNN's recurrent nets have none: torch's
    own are used, from the first call of a recurrent net on. Fused layer norm and batch norm have a
    wrong third derivative: for order >= 2 they are computed in elementary operations. The context
    can be entered again after it has been left.

    Args:
        order: k, the order of the penalty.
    """

    def __init__(self, order: int = 1) -> None:
        self.order = order
        self.others: ExitStack | None = None

    def __enter__(self) -> None:
        self.fused = [enable for enabled, enable in FUSED if enabled()]
        for enable in self.fused:
            enable(False)
        self.math = MATH_ENABLED()
        if not self.math:
            ENABLE_MATH(True)
        cudnn = torch.backends.cudnn.is_available()
        if self.order >= 2 or cudnn:
            self.others = ExitStack()
            if cudnn:
                self.others.enter_context(without_cudnn())
            if self.order >= 2:
                self.others.enter_context(elementary())

    def __exit__(self, *exception: object) -> None:
        if self.others is not None:
            self.others.close()
        for enable in self.fused:
            enable(True)
        if not self.math:
            ENABLE_MATH(False)


FUSED = [attention_switch(kind) for kind in ("flash", "mem_efficient", "cudnn")]
MATH_ENABLED, ENABLE_MATH = attention_switch("math")


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Disable cuDNN from the first call of a recurrent net on."""
    cudnn = torch.backends.cudnn.enabled

    def leave(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.RNNBase):
            torch.backends.cudnn.enabled = False

    hook = register_module_forward_pre_hook(leave)
    try:
        yield
    finally:
        hook.remove()
        torch.backends.cudnn.enabled = cudnn
