"""Elementwise functions h by the class of their nodes: their slopes, and products with h''."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The kernels that torch's own backward passes call. There are no public functions for them.
ATEN: Any = torch.ops.aten
derivative_of_sigmoid: Callable[[Tensor, Tensor], Tensor] = ATEN.sigmoid_backward.default

Slope = tuple[Tensor, Any]  # h'(z), and what is kept for the second derivative


class Activation(NamedTuple):
    """An elementwise function a = h(z), whose derivatives are computed from s, which is z or a.

    Args:
        saved: the name of s among what its node has saved.
        slope: (s, a, numbers) to h'(z), and what is kept for ``second``.
        second: (v, g, s, a, kept, numbers) to v g dh'/ds; None where that is zero everywhere.
        numbers: the names of the function's own numbers among what its node has saved.
        suits: whether the formulas are for these numbers.
    """

    saved: str
    slope: Callable[..., Slope]
    second: Callable[..., Tensor] | None
    numbers: tuple[str, ...] = ()
    suits: Callable[..., bool] = lambda *_: True

    @property
    def of_result(self) -> bool:
        """Whether s is a."""
        return self.saved == "result"


def by(kernel: Callable[..., Tensor]) -> Callable[..., Slope]:
    """Return what computes h' by torch's kernel for g h'."""

    def slope(s: Tensor, a: Tensor, *numbers: Any) -> Slope:
        return kernel(torch.ones_like(s), s, *numbers), None

    return slope


def of_tanh(v: Tensor, g: Tensor, y: Tensor, *_: Any) -> Tensor:
    """Return v g d(1 - y²)/dy."""
    return (v * g).mul_(y).mul_(-2)


def of_sigmoid(v: Tensor, g: Tensor, y: Tensor, *_: Any) -> Tensor:
    """Return v g d(y - y²)/dy."""
    return (y * -2).add_(1).mul_(v).mul_(g)


def silu_slope(z: Tensor, a: Tensor) -> Slope:
    """Return h'(z) of a = z σ(z), which is σ + a (1 - σ), and σ."""
    sigma = torch.sigmoid(z)
    return torch.addcmul(a, a, sigma, value=-1).add_(sigma), sigma


def of_silu(v: Tensor, g: Tensor, z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """Return v g h''(z) of a = z σ(z): σ (1 - σ) (2 + z - 2 a)."""
    factor = torch.sub(z, a, alpha=2).add_(2).mul_(v).mul_(g)
    return derivative_of_sigmoid(factor, sigma)


def gelu(g: Tensor, z: Tensor, approximate: str) -> Tensor:
    """Return g h'(z) of GELU."""
    product: Tensor = ATEN.gelu_backward.default(g, z, approximate=approximate)
    return product


def of_gelu(v: Tensor, g: Tensor, z: Tensor, *_: Any) -> Tensor:
    """Return v g h''(z) of h(z) = z Φ(z): φ(z) (2 - z²)."""
    squares = z.square().clamp_(max=1e4)  # where exp(-squares / 2) is zero
    density = torch.exp(squares / -2).mul_((2 * math.pi) ** -0.5)
    return squares.neg_().add_(2).mul_(density).mul_(v).mul_(g)


def of_softplus(
    v: Tensor, g: Tensor, z: Tensor, a: Tensor, _: None, beta: float, threshold: float
) -> Tensor:
    """Return v g h''(z) of h(z) = log(1 + exp(βz))/β: β σ(βz) (1 - σ(βz)), below the threshold."""
    scaled = z * beta
    product = derivative_of_sigmoid((v * g).mul_(beta), torch.sigmoid(scaled))
    return product.masked_fill_(scaled > threshold, 0)


def elu(g: Tensor, z: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    """Return g h'(z) of ELU."""
    product: Tensor = ATEN.elu_backward.default(g, alpha, scale, input_scale, False, z)
    return product


def of_elu(v: Tensor, g: Tensor, z: Tensor, a: Tensor, _: None, *numbers: float) -> Tensor:
    """Return v g h''(z) of ELU, which is h'(z) itself below zero, by the scale of z."""
    return elu(v * g, z, *numbers).mul_(numbers[2]).masked_fill_(z > 0, 0)


def leaky(g: Tensor, z: Tensor, slope: float) -> Tensor:
    """Return g h'(z) of leaky ReLU."""
    product: Tensor = ATEN.leaky_relu_backward.default(g, z, slope, False)
    return product


relu: Callable[[Tensor, Tensor], Tensor] = partial(ATEN.threshold_backward.default, threshold=0)

ACTIVATIONS = {
    "ReluBackward0": Activation("result", by(relu), None),
    "LeakyReluBackward0": Activation("self", by(leaky), None, ("negative_slope",)),
    "TanhBackward0": Activation("result", by(ATEN.tanh_backward.default), of_tanh),
    "SigmoidBackward0": Activation("result", by(derivative_of_sigmoid), of_sigmoid),
    "SiluBackward0": Activation("self", silu_slope, of_silu),
    "GeluBackward0": Activation(
        "self", by(gelu), of_gelu, ("approximate",), lambda approximate: approximate == "none"
    ),
    "SoftplusBackward0": Activation(
        "self", by(ATEN.softplus_backward.default), of_softplus, ("beta", "threshold")
    ),
    "EluBackward0": Activation("self", by(elu), of_elu, ("alpha", "scale", "input_scale")),
}
