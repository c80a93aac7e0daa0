"""Power series: the coefficients of f(a_0 + a_1 t + ... + a_k t^k) from a_0, ..., a_k.

f satisfies a differential equation, which gives a recurrence for the coefficients; each function
takes O(k²) products of coefficients.

Source: Griewank and Walther (2008), Evaluating Derivatives, chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Series = list[Any]  # of tensors; of numbers; 0.0 is a coefficient that is known to be zero


def product(a: Series, b: Series, times: Callable[[Any, Any], Any] | None = None) -> Series:
    """Return the coefficients of a·b; ``times`` is any bilinear map, such as a matrix product."""
    if times is None:
        return [dot(a[: n + 1], b[n::-1]) for n in range(len(a))]
    return [
        total(times(x, y) for x, y in zip(a[: n + 1], b[n::-1], strict=True) if are_tensors(x, y))
        for n in range(len(a))
    ]


def are_tensors(*coefficients: Any) -> bool:
    """Whether all of some coefficients are tensors."""
    return all(isinstance(a, Tensor) for a in coefficients)


def dot(a: Series, b: Series, start: Any = None, weights: Sequence[float] | None = None) -> Any:
    """Return start + Σ w_i a_i b_i, in one operation for each term that is not known to be zero.

    Args:
        a: factors.
        b: factors.
        start: None is zero.
        weights: w; None is 1 for all. Without a start, a first weight of 1 saves an operation.
    """
    out = start
    for x, y, w in zip(a, b, weights or [1.0] * len(a), strict=True):
        if any(isinstance(factor, float) and factor == 0 for factor in (x, y)):
            continue
        if out is None:
            out = x * y if w == 1 else w * (x * y)
        elif are_tensors(x, y, out):
            out = torch.addcmul(out, x, y, value=w)
        else:
            out = out + w * (x * y)
    return 0.0 if out is None else out


def total(terms: Any) -> Any:
    """Return the sum of terms; 0.0 if there are none."""
    terms = iter(terms)
    out = next(terms, 0.0)
    for term in terms:
        out = out + term
    return out


def scaled(a: Series, factor: Any, shift: float = 0.0) -> Series:
    """Return the coefficients of factor·a + shift."""
    return [factor * a[0] + shift, *(factor * x for x in a[1:])]


Slope = Callable[[Series], tuple[Any, float]]  # (s, w) for w·s


def integral(start: Tensor, slope: Slope, a: Series) -> Series:
    """Solve y' = s a' with y_0 = start; ``slope`` returns s_m for y_0, ..., y_m, with a factor."""
    y: Series = [start]
    s: Series = []
    factors: list[float] = []
    for n in range(1, len(a)):
        s_m, factor = slope(y)
        s.append(s_m)
        factors.append(factor)
        weights = [factors[n - i] * i / n for i in range(n, 0, -1)]
        y.append(dot(a[n:0:-1], s, weights=weights))
    return y


def known_slope(s: Series) -> Slope:
    """Return a slope for `integral` that reads its coefficients from the series ``s``."""
    return lambda y: (s[len(y) - 1], 1.0)


def quotient(a: Series, b: Series) -> Series:
    """Return the coefficients of a / b."""
    c: Series = []
    for n in range(len(a)):
        c.append(dot(b[1 : n + 1], c[::-1], a[n], [-1.0] * n) / b[0])
    return c


def exp(a: Series) -> Series:
    """Solve y' = y a'."""
    return integral(a[0].exp(), lambda y: (y[-1], 1.0), a)


def log(a: Series) -> Series:
    """Solve y' = a' / a."""
    one = [torch.ones_like(a[0]), *[torch.zeros_like(a[0])] * (len(a) - 1)]
    return integral(a[0].log(), known_slope(quotient(one, a)), a)


def power(a: Series, p: float) -> Series:
    """Return a^p: by products for small integers p, so that a may be zero."""
    if p == int(p) and abs(p) <= 32:
        one = [torch.ones_like(a[0]), *[torch.zeros_like(a[0])] * (len(a) - 1)]
        y = one if p == 0 else a
        for _ in range(int(abs(p)) - 1):
            y = product(y, a)
        return quotient(one, y) if p < 0 else y
    return any_power(a, p)


def any_power(a: Series, p: Any) -> Series:
    """Return a^p for any number p, or a tensor: Σ_m binom(p, m) a_0^(p-m) (a - a_0)^m.

    A recurrence divides by a_0, which may be zero.
    """
    y, moved, powers = [a[0].pow(p), *[0.0] * (len(a) - 1)], [0.0, *a[1:]], [0.0]
    binomial = p * 0 + 1.0
    for m in range(1, len(a)):
        binomial = binomial * (p - m + 1) / m
        powers = moved if m == 1 else product(powers, moved)
        if isinstance(p, Tensor):  # it may hold whole numbers, as 2: y''' = 0
            gone = (binomial == 0) & (a[0] == 0)
            factor = torch.where(gone, 0.0, binomial * a[0].pow(torch.where(gone, 0.0, p - m)))
        else:
            factor = binomial * a[0].pow(p - m)
        y = [y[0], *(y[n] + factor * powers[n] for n in range(1, len(a)))]
    return y


def tanh(a: Series) -> Series:
    """Solve y' = (1 - y²) a'."""

    def slope(y: Series) -> tuple[Any, float]:
        return (1 - y[0] * y[0], 1.0) if len(y) == 1 else (half_of_square(y), -2.0)

    return integral(a[0].tanh(), slope, a)


def sigmoid(a: Series) -> Series:
    """Solve y' = (y - y²) a'."""
    return integral(a[0].sigmoid(), lambda y: (half_of_square(y, y[-1], -2.0), 1.0), a)


def half_of_square(y: Series, start: Any = None, factor: float = 1.0) -> Any:
    """Return start + factor·c_m/2, where c_m is coefficient m of y², for y_0, ..., y_m.

    The products of unlike coefficients come twice in c_m.
    """
    half = (len(y) + 1) // 2
    weights = [factor] * half
    if len(y) % 2:
        weights[-1] = factor / 2
    return dot(y[:half], y[::-1][:half], start, weights)


def sine_and_cosine(a: Series) -> tuple[Series, Series]:
    """Solve s' = c a', c' = -s a'."""
    s, c = [a[0].sin()], [a[0].cos()]
    for n in range(1, len(a)):
        weights = [i / n for i in range(n, 0, -1)]
        s_n = dot(a[n:0:-1], c, weights=weights)
        c.append(dot(a[n:0:-1], s, weights=[-w for w in weights]))
        s.append(s_n)
    return s, c


def erf(a: Series) -> Series:
    """Solve y' = 2/√π exp(-a²) a'."""
    bell = scaled(exp(scaled(product(a, a), -1.0)), 2 / math.sqrt(math.pi))
    return integral(a[0].erf(), known_slope(bell), a)


def softplus(a: Series, beta: float = 1.0, threshold: float = 20.0) -> Series:
    """Solve y' = sigmoid(β a) a'; y = a above torch's threshold."""
    y = integral(F.softplus(a[0], beta, threshold), known_slope(sigmoid(scaled(a, beta))), a)
    linear = a[0] * beta > threshold
    return [y[0], *(torch.where(linear, x, z) for x, z in zip(a[1:], y[1:], strict=True))]


def logsigmoid(a: Series) -> Series:
    """Solve y' = sigmoid(-a) a'."""
    return integral(F.logsigmoid(a[0]), known_slope(sigmoid(scaled(a, -1.0))), a)


def gelu(a: Series, approximate: str = "none") -> Series:
    """Return a Φ(a), or torch's tanh approximation."""
    if approximate == "tanh":
        inner = [x + 0.044715 * z for x, z in zip(a, power(a, 3), strict=True)]
        return product(a, scaled(tanh(scaled(inner, math.sqrt(2 / math.pi))), 0.5, 0.5))
    return product(a, scaled(erf(scaled(a, math.sqrt(0.5))), 0.5, 0.5))


def exponentials(a: Series, dim: int | Sequence[int]) -> tuple[Series, Series, Tensor]:
    """Return e^(a - m), its sum over ``dim``, and m, the constant maximum over ``dim``."""
    top = a[0].detach().amax(dim, keepdim=True)
    e = exp([a[0] - top, *a[1:]])
    return e, [x.sum(dim, keepdim=True) for x in e], top


def softmax(a: Series, dim: int) -> Series:
    """Return e^a / Σ e^a over ``dim``."""
    e, sums, _ = exponentials(a, dim)
    return quotient(e, sums)


def log_softmax(a: Series, dim: int) -> Series:
    """Return a - log Σ e^a over ``dim``."""
    _, sums, top = exponentials(a, dim)
    logs = log(sums)
    return [a[0] - top - logs[0], *(x - y for x, y in zip(a[1:], logs[1:], strict=True))]


def standardised(a: Series, dims: Sequence[int], eps: float) -> Series:
    """Return (a - mean) / √(variance + ε) over ``dims``."""
    centred = [x - x.mean(dims, keepdim=True) for x in a]
    var = [x.mean(dims, keepdim=True) for x in product(centred, centred)]
    return product(centred, power([var[0] + eps, *var[1:]], -0.5))
