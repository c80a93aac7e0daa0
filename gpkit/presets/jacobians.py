"""Penalties of the derivatives of outputs, or of a hidden layer, in the inputs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from gpkit import checks
from gpkit.axes.activation import activation as named
from gpkit.axes.form import Form, norm, of_norm, squared
from gpkit.axes.weight import Schedule
from gpkit.estimators.power_iteration import power_iteration
from gpkit.estimators.projection import projection
from gpkit.estimators.trace import trace
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def jacobian(weight: float | Schedule = 0.01, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the Jacobian of the outputs (logits) in the inputs.

    .. math:: \frac\lambda2 \, \text{mean}_i \,
              \Big\|\frac{\partial f(x_i)}{\partial x_i}\Big\|_F^2

    Call ``penalty(net, x)``, or ``penalty(logits, x)`` with logits ``[B, C]`` of an ``x``
    ``[B, *S]`` that requires grad.

    Args:
        weight: λ, the paper's λ: the ½ is inside.
        **axes: see `gpkit.presets`; ``estimator`` is ``projection(1)``, one backward pass, by
            default; "exact" takes C backward passes.

    Returns:
        The penalty.

    Source: Hoffman, Roberts and Yaida (2019), arXiv:1908.02729.

    >>> import torch
    >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> penalty = jacobian(weight=1.0, estimator="exact")
    >>> penalty(lambda x: x @ A.T, torch.zeros(5, 2)).item()  # ½‖A‖² = 30 / 2
    15.0
    """
    return preset(
        "jacobian",
        weight,
        Axes(of="output", wrt="input", form=squared(scale=0.5), estimator=projection(1)),
        axes,
    )


def curvature(weight: float | Schedule = 0.01, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the k-th derivative of the outputs in the inputs.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla^k_{x_i} f(x_i)\|_F^2

    The norm is over all outputs and all n^k entries of each; mixed derivatives count as often as
    they occur. With a large weight, what remains are polynomials of degree k - 1. Call
    ``penalty(f, x)``, or ``penalty(y, x)`` with outputs ``[B]`` or ``[B, C]`` of an ``x``
    ``[B, *S]`` that requires grad.

    Args:
        weight: λ, a factor of the whole square: there is no ½ inside.
        **axes: see `gpkit.presets`; ``order`` is k, 2 by default. ``estimator="projection"`` takes
            k backward passes, "exact", the default, 1 + n + ... + n^(k-1) for each output.

    Returns:
        The penalty.

    Source: the order 2 in one dimension is the cubic smoothing spline's, Reinsch (1967),
    doi:10.1007/BF02162161.

    >>> import torch
    >>> A = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> f = lambda x: torch.einsum("bi,ij,bj->b", x, A, x)
    >>> curvature(weight=1.0)(f, torch.ones(4, 2)).item()  # ‖A + Aᵀ‖² = 4 + 4 + 4 + 36
    48.0
    """
    return preset("curvature", weight, Axes(of="output", wrt="input", order=2), axes)


def spectral_jacobian(weight: float | Schedule = 0.01, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the spectral norm of the Jacobian of the outputs (logits) in the inputs.

    .. math:: \lambda \, \text{mean}_i \,
              \sigma_{\max}\Big(\frac{\partial f(x_i)}{\partial x_i}\Big)^2

    Call ``penalty(net, x)``, or ``penalty(logits, x)`` with logits ``[B, C]`` of an ``x``
    ``[B, *S]`` that requires grad. Every sample has its own largest singular value.

    Args:
        weight: λ, a factor of the square: there is no ½ inside.
        **axes: see `gpkit.presets`; ``estimator`` is ``power_iteration(10)``, 22 backward passes,
            by default. "exact" and "projection" give the Frobenius norm instead.

    Returns:
        The penalty.

    Source: Johansson et al. (2022), arXiv:2206.13581.

    >>> import torch
    >>> A = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> penalty = spectral_jacobian(weight=1.0)
    >>> round(penalty(lambda x: x @ A.T, torch.zeros(5, 2)).item(), 4)  # 3², not 3² + 1²
    9.0
    """
    return preset(
        "spectral_jacobian",
        weight,
        Axes(of="output", wrt="input", estimator=power_iteration(10)),
        axes,
    )


def contractive(
    weight: float | Schedule = 0.1, activation: str = "features", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the Jacobian of a hidden layer in the inputs, as a contractive auto-encoder does.

    .. math:: \lambda \, \text{mean}_i \, \Big\|\frac{\partial h(x_i)}{\partial x_i}\Big\|_F^2

    Call ``penalty(net, x)`` with the net that has the layer and ``x`` ``[B, *S]``. If you have h
    ``[B, *H]`` with its graph, ``gpkit.jacobian()(h, x)`` is the same. For a sigmoid layer with
    weights W the square is :math:`\sum_j (h_j (1 - h_j))^2 \|W_j\|^2`.

    Args:
        weight: λ, the paper's λ, with the mean over samples: there is no ½ inside.
        activation: the name of the layer in ``net.named_modules()``. "features" is everything
            before the head in gpkit's own `MLP` and `ConvNet`.
        **axes: see `gpkit.presets`; ``estimator`` is ``projection(1)``, one backward pass, by
            default; "exact" takes one for each entry of h.

    Returns:
        The penalty.

    Source: Rifai et al. (2011), https://icml.cc/2011/papers/455_icmlpaper.pdf.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> penalty = contractive(weight=1.0, activation="0", estimator="exact")
    >>> penalty(net, torch.zeros(5, 2)).item()  # ‖W‖² = 30
    30.0
    """
    return preset(
        "contractive",
        weight,
        Axes(of=named(activation), wrt="input", estimator=projection(1)),
        axes,
    )


def laplacian(
    weight: float | Schedule = 5e-4,
    low: float | None = None,
    high: float | None = None,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Penalise the Laplacian of a field.

    .. math:: \lambda \, \text{mean}_i \, |\Delta f(x_i)|, \quad \text{or with bounds} \quad
              \lambda \, \text{mean}_i \, \min(\max((\Delta f(x_i))^2, \text{low}), \text{high})

    Δf is the trace of the Hessian, exactly: d + 1 backward passes for points ``[B, d]``, or with
    ``estimator=gpkit.trace(jets=True)`` d forward passes on Taylor series. It is not the sum of all
    entries of the Hessian, which published code takes for it. Call ``penalty(f, x)``, or
    ``penalty(y, x)`` with y ``[B]`` or ``[B, 1]`` of an ``x`` that requires grad. For squares
    without bounds, by two draws instead of d passes, use ``form="squared"`` and
    ``estimator=gpkit.trace(2)``.

    Args:
        weight: λ, a factor of the whole: there is no ½ inside.
        low: the value that a square does not fall below, so that small ones are not trained; None
            for |Δf|.
        high: the value that a square does not exceed, against outliers.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Raises:
        ValueError: if only one bound is given.

    Source: Li et al. (2023), Neuralangelo, arXiv:2306.03092; with bounds, as in public code of
    Ben-Shabat et al. (2022), DiGS, arXiv:2106.10811.

    >>> import torch
    >>> f = lambda x: x.norm(dim=1)  # Δ|x| = 2/|x| in three dimensions
    >>> x = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    >>> round(laplacian(weight=1.0)(f, x).item(), 4)  # (1 + 0.4) / 2
    0.7
    """
    if (low is None) != (high is None):
        raise ValueError(
            f"`laplacian(low=..., high=...)` needs both bounds, or none; got {low}, {high}"
        )
    form: Form = norm()
    if low is not None and high is not None:
        checks.number("laplacian(low=...)", low, 0)
        checks.number("laplacian(high=...)", high, low)
        form = of_norm(partial(clamped_square, low=low, high=high))
    chosen = Axes(of="output", wrt="input", order=2, form=form, estimator=trace())
    return preset("laplacian", weight, chosen, axes)


def clamped_square(n: Tensor, low: float, high: float) -> Tensor:
    """Return n² between two bounds."""
    return n.square().clamp(low, high)
