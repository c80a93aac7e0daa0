"""What the slopes of a critic tell: how steep it is, how near its optimum, how far two sets are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gpkit import formula
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.random import derived_seed
from gpkit.axes.at import interpolate
from gpkit.formula import Terms
from gpkit.lightning.gan.losses import GANLoss, gap
from gpkit.lightning.norms import input_norms
from gpkit.needs import needs_of
from gpkit.penalty import Penalty


def slopes(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, seed: int
) -> dict[str, Tensor]:
    """Return ‖∇D‖ of each sample, ``[B]``, on real and fake samples and interpolates of the two.

    Of a critic of several scores it is the slope of their mean. The forwards leave no trace in
    buffers or random numbers, and no graph.

    Args:
        critic: ``[B, *S] -> [B, ...]``.
        real: x, ``[B, *S]``.
        fake: y, ``[B, *S]``.
        seed: of the interpolates, one α in U[0, 1] for each sample.

    Returns:
        The slopes by the names "real", "fake" and "interpolates".

    >>> critic = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> slopes(critic, torch.ones(2, 2), torch.zeros(2, 2), seed=0)["interpolates"]
    tensor([5., 5.])
    """
    rng = torch.Generator(real.device).manual_seed(seed)
    (between,) = interpolate()((real.detach(),), (fake.detach(),), rng)
    found = {}
    for name, points in {"real": real, "fake": fake, "interpolates": between}.items():
        with torch.enable_grad():
            x = points.detach().requires_grad_()
            with isolated(critic, derived_seed(seed, name), x.device, twice=False):
                scores = critic(x)
            found[name] = input_norms(scores.reshape(len(x), -1).mean(1), x)
    return found


def optimality(
    loss: GANLoss,
    of_real: Tensor,
    of_fake: Tensor,
    penalties: Iterable[tuple[Any, Terms | None]],
) -> Tensor:
    r"""Return how far a critic D is from its optimum, along its own scale: zero at the optimum.

    A net whose last layer is linear can become sD for every s > 0, so at the optimum of its loss L
    and penalties P_k = λ_k E form_k(n) the derivative along s vanishes. The norms n of D's
    derivatives, of any order, are those of sD divided by s, so that

    .. math:: \text{optimality} = -\frac{d}{ds}\Big|_{s=1} \Big(L(sD) + \sum_k P_k(sD)\Big)
              = -\frac{d}{ds}\Big|_{s=1} L(sD) - \sum_k \lambda_k \, E[n \, \text{form}_k'(n)].

    It is positive where the critic would do better to be steeper. For the Wasserstein loss the
    first term is E D(x) − E D(y), and the second is, for the penalty (n − 1)², 2λ E[n(n − 1)]; for
    max(0, n − 1)², 2λ E[n max(0, n − 1)]; for (γ/2) n², γ E[n²]; for n^p, λp E[n^p]. With a
    slope n that is the same everywhere, n = 1 + W/2λ is then the optimum of the first, and
    E D(x) − E D(y) = nW: divided by the slope it is the Wasserstein distance W.

    Args:
        loss: L.
        of_real: D(x), ``[B, ...]``.
        of_fake: D(y), ``[B, ...]``.
        penalties: those of `scales_with_critic`, with the terms of this critic; None for a term
            whose weight is zero. Lazy ones count with their mean weight.

    Returns:
        One number, in the units of the loss.

    >>> import gpkit
    >>> from gpkit.lightning.gan.losses import WASSERSTEIN
    >>> x, y = torch.full((8, 1), 4.0), torch.zeros(8, 1)  # W = 4, so n = 1 + 4 / 20 at λ 10
    >>> critic = lambda x: 1.2 * x
    >>> penalty = gpkit.wgan_gp(10.0)
    >>> terms = penalty.terms(critic, real=x, fake=y)
    >>> abs(optimality(WASSERSTEIN, critic(x), critic(y), [(penalty, terms)]).item()) < 1e-5
    True
    """
    with torch.enable_grad():
        of_real, of_fake = (scores.detach().to(torch.float64) for scores in (of_real, of_fake))
        s = torch.ones((), dtype=torch.float64, device=of_real.device, requires_grad=True)
        total = loss.critic(s * of_real, s * of_fake)
        for penalty, terms in penalties:
            if terms is not None:
                squared_norms = s.square() * terms.squared_norms.detach().to(torch.float64)
                lazy = formula.terms(penalty, squared_norms, terms.weight / penalty.every)
                total = lazy.added_to(total)
        (derivative,) = torch.autograd.grad(total, s)
    return -derivative


def scales_with_critic(penalty: Penalty) -> bool:
    """Whether a penalty's norms are those of derivatives of the critic's output in its input."""
    needs = needs_of(penalty)
    inside = needs.in_weights or needs.environments or needs.activations
    return not inside and penalty.axes()["of"] != "sampled_loss"


def center(penalties: Iterable[Penalty]) -> float:
    """Return the slope that the first penalty with a centre draws to; 1 if there is none."""
    centers = (getattr(p.axes().get("form"), "c", None) for p in penalties)
    return next((c for c in centers if c is not None), 1.0)


def described(penalties: Mapping[str, Penalty], steep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return mean, maximum and the share above the centre of slopes ``[B]``, by names for logs."""
    numbers = {}
    for where, n in steep.items():
        numbers[f"slope/{where}"] = n.mean()
        numbers[f"slope/{where}/max"] = n.amax()
        above = n > center(penalties.values())
        numbers[f"slope/{where}/above_center"] = above.to(n.dtype).mean()
    return numbers


def wasserstein(of_real: Tensor, of_fake: Tensor, steep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return E D(x) − E D(y), and the same over the mean slope on interpolates: an estimate of W₁.

    Args:
        of_real: D(x), ``[B, ...]``.
        of_fake: D(y), ``[B, ...]``.
        steep: from `slopes`.

    Returns:
        ``wasserstein/raw`` and ``wasserstein/debiased``; over a slope of zero the latter is zero.
    """
    raw, slope = gap(of_real, of_fake), steep["interpolates"].mean()
    debiased = torch.where(slope > 0, raw / slope, raw * 0)
    return {"wasserstein/raw": raw, "wasserstein/debiased": debiased}
