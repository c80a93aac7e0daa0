"""Kernels that have a double backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkit.autodiff.compat import attention_switch
from gpkit.autodiff.norm_layers import elementary


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
