"""The k-th derivative along one direction, by Taylor mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.isolation import double_backward
from gpkit.autodiff.reached import reach, require_no_script
from gpkit.autodiff.taylor import in_graph
from gpkit.autodiff.taylor import rules as rules  # registers them


def directional_derivative(f: Callable[..., Any], x: Any, v: Any, order: int = 1) -> Tensor:
    r"""Return the k-th derivative of ``f`` at ``x`` along ``v``, by Taylor mode, differentiable.

    .. math:: D^k f(x)[v, \dots, v] = \frac{d^k}{dt^k} f(x + t v) \Big|_{t = 0}

    It runs ``f`` once on truncated Taylor series. A matrix product with a weight becomes k + 1
    products; a product of two tensors that depend on x becomes O(k²) products. Nested gradients
    take about 2^k. The result is an ordinary tensor: its backward pass gives gradients with respect
    to x, v and the parameters.

    Args:
        f: a function of tensors, such as a module, made of smooth operations.
        x: ``[B, *S]``, or a tuple of tensors for several arguments of ``f``.
        v: the direction, in the shape of ``x``.
        order: k >= 1.

    Returns:
        ``[B, *O]``, the shape of ``f(x)``.

    Raises:
        NotImplementedError: if ``f`` runs an operation without a rule; the message names it.
        TypeError: if ``f`` does not return a tensor.
        ValueError: if the shapes do not fit, x is of whole numbers, or ``order`` < 1.

    Source: Griewank and Walther (2008), Evaluating Derivatives, chapter 13.

    >>> x = torch.tensor([-2.0, 1.0])
    >>> directional_derivative(lambda x: 2 * x**3, x, torch.ones(2), order=2)  # 12 x
    tensor([-24.,  12.])
    """
    checks.integer("directional_derivative(order=...)", order, 1)
    xs = tuple(x) if isinstance(x, (list, tuple)) else (x,)
    vs = tuple(v) if isinstance(v, (list, tuple)) else (v,)
    shapes = [list(a.shape) for a in xs], [list(a.shape) for a in vs]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`directional_derivative(f, x, v)` needs v in the shape of x; "
            f"got x {shapes[0]} and v {shapes[1]}"
        )
    whole = next((a.dtype for a in xs if not (a.is_floating_point() or a.is_complex())), None)
    if whole is not None:
        raise ValueError(
            f"`directional_derivative(f, x, v)` needs x of floating-point numbers; got {whole}: "
            "use x.float()"
        )
    require_no_script(reach(f).family)
    train = torch.is_grad_enabled()
    # elementary norm layers; and jets need grad mode: under no_grad the function is a constant
    with double_backward(max(order, 2)), torch.enable_grad():
        out = last_derivative(f(*paths(xs, vs, order)), order)
    return out if train else out.detach()


def paths(xs: tuple[Tensor, ...], vs: tuple[Tensor, ...], order: int) -> tuple[Tensor, ...]:
    """Return x + t v as jets of that order, one for each x."""
    return tuple(in_graph.path(x, v, order) for x, v in zip(xs, vs, strict=True))


def last_derivative(y: Any, order: int) -> Tensor:
    """Return k! a_k for a jet y; zeros if y does not depend on the path."""
    if not isinstance(y, Tensor):
        raise TypeError(f"the function must return a tensor; got a {type(y).__name__}")
    return math.factorial(order) * in_graph.coefficient(y, order)
