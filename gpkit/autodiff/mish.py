"""Mish with derivatives that are finite and right everywhere, in a graph that exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.compat import is_mish, saved_input


@contextmanager
def mended(*ys: Tensor) -> Iterator[None]:
    """A context in which gradients through Mish in the graph of ``ys`` can be differentiated again.

    torch's second derivative of Mish is NaN from 89 on in float32, and from 710 on in float64,
    because it multiplies an infinity by zero. Here the nodes of Mish give their gradient by
    `slope`, whose derivatives are finite. The graph is as before at the end.

    >>> import gpkit
    >>> x = torch.tensor([100.0], requires_grad=True)
    >>> gpkit.derivative(F.mish(x), x, order=2).tolist()
    [0.0]

    Args:
        *ys: the outputs, whose gradients are taken in this context, with create_graph.

    Yields:
        Nothing.
    """
    found = []
    if not torch.compiler.is_compiling():
        found = [node for y in ys for node in graph.nodes(y) if is_mish(node)]
    handles = [hook(node) for node in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook(node: Any) -> Any:
    """Let a node of Mish give its gradient by `slope`."""

    def gradient(_: Any, grads: tuple[Tensor]) -> tuple[Tensor]:
        return (grads[0] * slope(saved_input(node)),)

    return node.register_hook(gradient)


def slope(x: Tensor) -> Tensor:
    r"""Return the derivative of Mish, x tanh(softplus x), differentiable any number of times.

    .. math:: t + x \, \sigma(x) (1 - t) (1 + t), \quad t = \tanh(-\log \sigma(-x))
    """
    t = torch.tanh(-F.logsigmoid(-x))
    return t + x * torch.sigmoid(x) * (1 - t) * (1 + t)
