"""Private API of torch that saves a repeated call microseconds.

`tests/shortcut/test_compat.py` fails with the name of what a release takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.derivatives import unhooked
from gpkit.hints import ExplainedError

# parts_of(module): the dictionaries of its own children, parameters, buffers and forward hooks.
# torch's iterators over them take a hundred times as long.
_HELD = "_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"
parts_of: Callable[[nn.Module], tuple[dict[str, Any], ...]] = attrgetter(*_HELD)


# The hooks that run with each module. torch has no public way to ask for them.
_EVERYWHERE = torch.nn.modules.module
GLOBAL_HOOKS = _EVERYWHERE._global_forward_hooks, _EVERYWHERE._global_forward_pre_hooks


def _by_grad(
    outputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    retain: bool,
    create: bool,
    inputs: tuple[Tensor, ...],
    unused: bool,
    accumulate_grad: bool,
) -> tuple[Tensor | None, ...]:
    options: dict[str, Any] = {"create_graph": create, "allow_unused": unused}
    return torch.autograd.grad(outputs, inputs, grads, retain, **options)


# What `torch.autograd.grad` calls after its checks of the arguments, which take 20 µs, on a cold
# cache 50. The public function is the fallback if a release renames it.
_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
RUN: Callable[..., tuple[Tensor | None, ...]] = getattr(_ENGINE, "run_backward", _by_grad)


def gradient(y: Tensor, x: Tensor, times: Tensor) -> Tensor | None:
    """Return the gradient in x of Σ times·y, with a graph, or None where y does not depend on x.

    Args:
        y: the output, which has a graph.
        x: the variable.
        times: in the shape and dtype of y.

    Returns:
        The gradient, in the shape of x.
    """
    with unhooked((x,)):
        (g,) = RUN((y,), (times,), True, True, (x,), True, accumulate_grad=False)
    return g


def gradients(y: Tensor, xs: tuple[Tensor, ...], ones: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of Σ y in each x, without a graph; None where y does not depend on x.

    The graph of y is freed. Hooks on x are called; see `unhooked`.

    Args:
        y: the output, which has a graph.
        xs: the variables.
        ones: in the shape and dtype of y.

    Returns:
        The gradients.
    """
    return RUN((y,), (ones,), False, False, xs, True, accumulate_grad=False)


def differentiable(y: Tensor, xs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradient of Σ y in each x, with a graph; None where y does not depend on x.

    Args:
        y: the output, which has a graph.
        xs: the variables, or edges of the graph.

    Returns:
        The gradients.

    Raises:
        ExplainedError: if an operation has no derivative; the message says what to do.
    """
    ones, tensors = torch.ones_like(y), [x for x in xs if isinstance(x, Tensor)]
    try:
        with unhooked(tensors):
            return RUN((y,), (ones,), True, True, (*xs,), True, accumulate_grad=False)
    except RuntimeError as error:
        raise ExplainedError(error) from error


# The base class of autograd Functions, whose `apply` does what theirs does after a look for
# transforms of torch.func, which takes 10 µs on a cold cache.
_BASE: Any = super(torch.autograd.Function, torch.autograd.Function)


def applied(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Return ``function.apply(*args)``, where no transform of torch.func is active."""
    base: Any = super(torch.autograd.Function, function)
    out: Tensor = (base if hasattr(_BASE, "apply") else function).apply(*args)
    return out
