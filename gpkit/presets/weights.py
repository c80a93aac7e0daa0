"""Penalties in the weights. L is the loss of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit import checks
from gpkit.axes.form import norm
from gpkit.axes.weight import Schedule
from gpkit.axes.wrt import weights
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.projection import projection
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def none(weight: float | Schedule = 0.0, **axes: Unpack[Axes]) -> GradientPenalty:
    """No penalty: 0, the baseline of every comparison. Nothing is evaluated.

    Args:
        weight: accepted, so that a sweep over penalties can set it, and without effect.
        **axes: of `GradientPenalty`; likewise.

    Returns:
        A penalty that is zero whatever it is called with.

    >>> import torch
    >>> none()(torch.tensor(3.0), [])
    tensor(0.)
    """
    return preset("none", 0.0, Axes(), axes)


def weight_grad_norm(
    weight: float | Schedule = 0.01, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the gradient of the loss in the weights.

    .. math:: \lambda \, \|\nabla_\theta L\|^2, \quad L = \text{mean}_i \, \ell_i

    Called ``penalty(loss, net.parameters())`` with a loss ``[]`` (or losses ``[B]``, whose mean is
    taken), or ``penalty(closure, net)``. The norm is that of the micro-batch's mean gradient, over
    all parameters together. Strength: Barrett and Dherin write the implicit penalty of a step lr as
    (lr/4) ‖∇L‖²; here λ is the whole factor.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*"; other than
            "*" it needs the call with the module.
        **axes: of `GradientPenalty`. With ``order=k`` >= 2 the norm is that of the k-th derivative,
            estimated by projections unless ``estimator`` says otherwise.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Barrett and Dherin (2021), arXiv:2009.11162; Smith et al. (2021), arXiv:2101.12176.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = (w**2).sum()                            # ∇L = 2w, ‖∇L‖² = 4·5
    >>> weight_grad_norm(weight=0.1)(loss, [w]).item()
    2.0
    """
    return preset("weight_grad_norm", weight, Axes(of="loss", wrt=weights(match)), axes)


def per_sample_grad_norm(
    weight: float | Schedule = 0.01, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the gradient of each sample's loss in the weights.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla_\theta \ell_i\|^2

    It is λ times the trace of the empirical Fisher matrix, and exceeds `weight_grad_norm` by the
    variance of the samples' gradients. Called ``penalty(losses, net.parameters())`` with losses
    ``[B]``, or ``penalty(closure, net)``; a scalar loss is refused. It takes B backward passes.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*"; other than
            "*" it needs the call with the module.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: for the empirical Fisher matrix Kunstner, Balles and Hennig (2019), arXiv:1905.12558.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> losses = torch.stack([w[0] ** 2, 3 * w[1]])     # ∇ℓ = (2, 0) and (0, 3)
    >>> per_sample_grad_norm(weight=1.0)(losses, [w]).item()  # (4 + 9) / 2
    6.5
    """
    chosen = Axes(of="loss", wrt=weights(match), scope="sample")
    return preset("per_sample_grad_norm", weight, chosen, axes)


def fisher(
    weight: float | Schedule = 0.01, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the gradient of the loss in the weights, with labels drawn from the model.

    .. math:: \lambda \, \| \text{mean}_i \, \nabla_\theta \ell(x_i, \hat y_i) \|^2,
              \quad \hat y_i \sim \mathrm{softmax}(f(x_i))

    The labels are drawn anew at every call from the penalty's own generator; ℓ is the
    cross-entropy. In expectation over them it is tr F / B, the trace of the batch's Fisher matrix
    over its size. Called ``penalty(logits, net)`` with ``[B, C]``, whose graph is reused, or
    ``penalty(lambda: net(x), net)``.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*".
        **axes: of `GradientPenalty`; ``scope="sample"`` takes the norm of each sample's gradient,
            whose expectation is tr F whatever the batch size.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Jastrzebski et al. (2021), arXiv:2012.14193.

    >>> import torch
    >>> z = torch.zeros(1, 2, requires_grad=True)
    >>> fisher(weight=1.0)(z, [z]).item()              # ‖p - onehot‖² = ½² + ½², either label
    0.5
    """
    return preset("fisher", weight, Axes(of="sampled_loss", wrt=weights(match)), axes)


def hessian(
    weight: float | Schedule = 1e-4, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the Hessian of the loss in the weights.

    .. math:: \lambda \, \|\nabla^2_\theta L\|_F^2, \quad L = \text{mean}_i \, \ell_i

    Estimated without bias as λ ‖∇²L v‖², v of ±1, in two backward passes for each projection.
    Called as `weight_grad_norm`: ``penalty(loss, net.parameters())``, or ``penalty(closure, net)``.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*"; other than
            "*" it needs the call with the module.
        **axes: of `GradientPenalty`; ``estimator`` is ``projection(1)``; "exact" takes a backward
            pass for every parameter.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: the estimate is Hutchinson's (1989), doi:10.1080/03610918908812806.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian(weight=1.0)(w[0] ** 3 + w[1] ** 3, [w]).item()  # ∇²L = diag(6, 12), 36 + 144
    180.0
    """
    chosen = Axes(of="loss", wrt=weights(match), order=2, estimator=projection(1))
    return preset("hessian", weight, chosen, axes)


def gnp(
    weight: float | Schedule | None = None,
    r: float = 0.05,
    alpha: float = 0.8,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Penalise the norm of the loss's gradient in the weights, as sharpness-aware training does.

    .. math:: \lambda \, \|\nabla_\theta L\|, \quad \lambda = \alpha r

    trained by a finite difference of length r, so that the gradient of the loss and penalty is

    .. math:: (1 - \alpha) \nabla L(\theta)
              + \alpha \nabla L(\theta + r \, \nabla L / \|\nabla L\|).

    α = 1 is exactly SAM. Called ``penalty.with_loss(closure, net)``, which gives loss and penalty
    for two forward and backward passes in all, or ``penalty(closure, net)`` to add to a loss of
    your own, for one more.

    Args:
        weight: λ, or a schedule of it; None is α·r.
        r: the length of the step, SAM's ρ.
        alpha: α, the part of the gradient that is taken at the other point.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Zhao, Zhang and Hu (2022), arXiv:2202.03599; SAM: Foret et al. (2021),
    arXiv:2010.01412.

    >>> import torch
    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> total = gnp(r=0.5, alpha=1.0).with_loss(lambda: (w**2).sum() / 2, [w])  # ∇L = w
    >>> total.item(), torch.autograd.grad(total, w)[0]  # 25/2 + 0.5·5 and w + 0.5 w/‖w‖
    (15.0, tensor([3.3000, 4.4000]))
    """
    checks.number("gnp(r=...)", r, 0, strict=True)
    checks.number("gnp(alpha=...)", alpha, 0)
    return preset(
        "gnp",
        alpha * r if weight is None else weight,
        Axes(of="loss", wrt="weight", form=norm(), estimator=finite_difference(r)),
        axes,
    )
