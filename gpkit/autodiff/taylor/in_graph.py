"""Jets in a compiled loss.

Dynamo, which traces the loss, knows no tensor subclass without storage. It need not: it is shown
two functions, of which it sees tensors go in and come out, and notes all that happens between them.
What it has noted is run once more to get the graph of single operations, forward and backward, and
then one of the functions makes jets, the other reads them, and each operation between is a rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.taylor.jets import Jet
from gpkit.autodiff.tracing.compat import is_noted


def allow() -> None:
    """Tell torch.compile not to look into the two functions."""
    for function in (path, coefficient):
        torch.compiler.allow_in_graph(function)


def path(x: Tensor, v: Tensor, order: int) -> Tensor:
    """Return x + t v as a jet of that order; to Dynamo a tensor like x."""
    if is_noted(x):
        return x.clone()
    return Jet([x, v, *[0.0] * (order - 1)])


def coefficient(y: Any, n: int) -> Tensor:
    """Return the coefficient a_n of a jet, zero for n > 0 if it is none; to Dynamo one like y."""
    if is_noted(y):
        return y.clone()
    if isinstance(y, Jet):
        return y.coefficients[n]
    return torch.zeros_like(y) if n else y
