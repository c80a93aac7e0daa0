"""Taylor mode: the k-th derivative along one direction, at a cost that is polynomial in k."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gpkit.autodiff.taylor.rules  # noqa: F401  registers the rule of every operation
from gpkit import checks
from gpkit.autodiff.kernels import double_backward
from gpkit.autodiff.taylor import rules as rules  # registers them
from gpkit.autodiff.taylor.jets import Jet


def directional_derivative(f: Callable[..., Any], x: Any, v: Any, order: int = 1) -> Tensor:
    r"""Return the k-th derivative of ``f`` at ``x`` along ``v``, sample by sample, differentiable.

    .. math:: D^k f(x)[v, \dots, v] = \frac{d^k}{dt^k} f(x + t v) \Big|_{t = 0}

    One run of ``f`` on truncated Taylor series gives it: k + 1 matrix products where ``f`` has one
    with a weight, and O(k²) where both sides depend on x; k nested gradients take of the order of
    2^k. Coefficients are ordinary tensors: backpropagate through the result for gradients in x, v
    and the parameters.

    Args:
        f: a function of tensors, as a module: of smooth operations, none of them in place.
        x: ``[B, *S]``, or a tuple of tensors for several arguments of ``f``.
        v: the direction, of the shape of ``x``.
        order: k >= 1.

    Returns:
        Of the shape of ``f(x)``, ``[B, *O]``.

    Raises:
        NotImplementedError: if ``f`` runs an operation without a rule; it names it.
        TypeError: if ``f`` gives anything but a tensor.
        ValueError: if the shapes do not fit, or ``order`` < 1.

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
            "`directional_derivative(f, x, v)` needs a v of the shape of x; "
            f"got x {shapes[0]} and v {shapes[1]}"
        )
    train = torch.is_grad_enabled()
    # norm layers in elementary operations; and a function under no_grad would be a constant
    with double_backward(max(order, 2)), torch.enable_grad():
        out = last_derivative(f(*paths(xs, vs, order)), order)
    return out if train else out.detach()


def paths(xs: tuple[Tensor, ...], vs: tuple[Tensor, ...], order: int) -> tuple[Jet, ...]:
    """Return x + t v, for each x, as jets of that order."""
    return tuple(
        Jet([x, v, *[torch.zeros_like(x)] * (order - 1)]) for x, v in zip(xs, vs, strict=True)
    )


def last_derivative(y: Any, order: int) -> Tensor:
    """Return k! a_k; zeros where y does not depend on the path."""
    if isinstance(y, Jet):
        return math.factorial(order) * y.coefficients[order]
    if not isinstance(y, Tensor):
        raise TypeError(f"the function gave a {type(y).__name__}, and a tensor was expected")
    return torch.zeros_like(y)
