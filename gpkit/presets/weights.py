"""Penalties of the loss's gradient in the weights. L is the mean loss of the batch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from gpkit import checks
from gpkit.axes.form import norm
from gpkit.axes.parameters import weights
from gpkit.axes.weight import Schedule
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.projection import projection
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def none(weight: float | Schedule = 0.0, **axes: Unpack[Axes]) -> GradientPenalty:
    """No penalty: always 0, the baseline of every comparison. Nothing is evaluated.

    Args:
        weight: has no effect; a sweep over penalties can set it.
        **axes: see `gpkit.presets`; they have no effect either.

    Returns:
        A penalty that is zero for every call.

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

    Call ``penalty(loss, net.parameters())`` with a loss ``[]`` or losses ``[B]``, whose mean is
    taken, or ``penalty(closure, net)``. The gradient is that of the micro-batch's mean loss, and
    its norm is over all parameters together.

    Args:
        weight: λ, a factor of the whole square. Gradient descent with step lr has an implicit
            penalty of (lr/4) ‖∇L‖² (Barrett and Dherin): λ = lr/4 adds as much again.
        match: a shell pattern for the names of the parameters, such as "head.*". With a pattern
            other than "*" call the penalty with the module.
        **axes: see `gpkit.presets`. With ``order=k`` >= 2 it is the norm of the k-th derivative,
            estimated by projections unless ``estimator`` is set.

    Returns:
        The penalty.

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

    This is λ times the trace of the empirical Fisher matrix. It exceeds `weight_grad_norm` by λ
    times the variance of the samples' gradients. A scalar loss is an error. Call

    - ``penalty(closure, net)`` or ``penalty.with_loss(closure, net)``, where the closure returns
      losses ``[B]``. The norms are computed
      from the inputs of the layers and the gradients of their outputs ("ghost norms"): one backward
      pass for all samples, and no gradient of a sample is stored. Linear, convolutional, embedding
      and norm layers have rules. With other parameters, or if the samples depend on each other, as
      in batch norm in training mode, a warning says so once, and it takes B backward passes.
    - ``penalty(losses, net.parameters())``: it takes B backward passes.

    Args:
        weight: λ, a factor of the whole square.
        match: as in `weight_grad_norm`.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

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

    ℓ is the cross-entropy. Each call draws new labels from the penalty's own generator. Over these
    labels the expectation of the square is tr F / B, the trace of the batch's Fisher matrix over
    the batch size. Call ``penalty(logits, net)`` with logits ``[B, C]``, whose graph is reused, or
    ``penalty(lambda: net(x), net)``.

    Args:
        weight: λ, a factor of the whole square.
        match: as in `weight_grad_norm`.
        **axes: see `gpkit.presets`. With ``scope="sample"`` it is the mean squared norm of the
            samples' own gradients, whose expectation is tr F for any batch size.

    Returns:
        The penalty.

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

    The estimate λ ‖∇²L v‖², with v of random signs, has no bias. It takes two backward passes for
    each projection. Call ``penalty(loss, net.parameters())`` with a loss ``[]`` or losses ``[B]``,
    or ``penalty(closure, net)``.

    Args:
        weight: λ, a factor of the whole square.
        match: as in `weight_grad_norm`.
        **axes: see `gpkit.presets`; ``estimator`` is ``projection(1)`` by default. "exact" takes
            one backward pass for every parameter.

    Returns:
        The penalty.

    Source: the estimate is Hutchinson's (1989), doi:10.1080/03610918908812806.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian(weight=1.0)(w[0] ** 3 + w[1] ** 3, [w]).item()  # ∇²L = diag(6, 12), 36 + 144
    180.0
    """
    chosen = Axes(of="loss", wrt=weights(match), order=2, estimator=projection(1))
    return preset("hessian", weight, chosen, axes)


def sam(
    weight: float | Schedule | None = None,
    rho: float = 0.05,
    adaptive: bool = False,
    eta: float = 0.01,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Sharpness-aware minimisation: the gradient is the one at weights moved up the slope.

    .. math:: \nabla L(\theta + \rho \, T^2 \nabla L / \|T \nabla L\|), \quad
              T = 1, \text{ or } |\theta| + \eta \text{ if adaptive}

    As a penalty it is `gnp` with α = 1: λ ‖T ∇_θ L‖ with λ = ρ, whose gradient is the finite
    difference (∇L(θ + ρ T² ∇L/‖T ∇L‖) - ∇L(θ)) / ρ. So the gradient of loss and penalty is
    exactly the one above. Call ``penalty.with_loss(closure, net)``, at two forward and backward
    passes in all; or add ``penalty(closure, net)`` to a loss of your own, at one pass more. The
    closure gives a loss ``[]`` or losses ``[B]``.

    Args:
        weight: λ; None is ρ. Another λ has the share λ/ρ of the gradient at the moved weights.
        rho: ρ, the length of the step, in the metric T. For adaptive steps it is larger: the paper
            has 0.5 to 2 where plain SAM has 0.05 to 0.1.
        adaptive: whether steps scale with the weights (ASAM), so that they do not depend on scales
            of layers that cancel. T is a constant, and applies to all parameters.
        eta: η, so that weights near zero move too.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Foret et al. (2021), arXiv:2010.01412; adaptive: Kwon et al. (2021), arXiv:2102.11600.

    >>> import torch
    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> total = sam(rho=0.5).with_loss(lambda: (w**2).sum() / 2, [w])  # ∇L = w
    >>> torch.autograd.grad(total, w)[0]  # w + 0.5 w/‖w‖
    tensor([3.3000, 4.4000])
    """
    checks.number("sam(rho=...)", rho, 0, strict=True)
    checks.number("sam(eta=...)", eta, 0)
    metric = partial(sizes, eta=eta) if adaptive else None
    difference = finite_difference(rho, cross_kinks=True)
    chosen = Axes(of="loss", wrt="weight", form=norm(), estimator=difference, metric=metric)
    return preset("sam", rho if weight is None else weight, chosen, axes)


def sizes(x: Tensor, eta: float) -> Tensor:
    """Return |x| + η."""
    return x.abs() + eta


def gnp(
    weight: float | Schedule | None = None,
    r: float = 0.05,
    alpha: float = 0.8,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Penalise the norm of the loss's gradient in the weights, as sharpness-aware training does.

    .. math:: \lambda \, \|\nabla_\theta L\|, \quad \lambda = \alpha r

    Its gradient is a finite difference of length r, so the gradient of loss and penalty is

    .. math:: (1 - \alpha) \nabla L(\theta)
              + \alpha \nabla L(\theta + r \, \nabla L / \|\nabla L\|).

    α = 1 is exactly SAM, see `sam`. Call ``penalty.with_loss(closure, net)`` for loss and penalty
    as one number, at two forward and backward passes in all. Or add ``penalty(closure, net)`` to a
    loss of your own, at one pass more. The closure gives a loss ``[]`` or losses ``[B]``.

    Args:
        weight: λ, the paper's λ, or a schedule of it; None is α·r.
        r: the length of the step; SAM's ρ.
        alpha: α, the share of the gradient that is taken at the other point.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

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
        Axes(
            of="loss", wrt="weight", form=norm(), estimator=finite_difference(r, cross_kinks=True)
        ),
        axes,
    )
