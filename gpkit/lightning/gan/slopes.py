"""Slopes of a critic: its steepness, the distance from its optimum, Wasserstein estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gpkit import formula
from gpkit.autodiff.compat import tree_map_only
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.random import derived_seed
from gpkit.axes.at import interpolate
from gpkit.formula import Terms
from gpkit.lightning.gan.losses import GANLoss, Scored, mean_score_gap, over_scales
from gpkit.lightning.gan.samples import Samples, at_points, first, floating
from gpkit.lightning.gan.scores import joined
from gpkit.lightning.norms import input_norms
from gpkit.needs import needs_of
from gpkit.penalty import Penalty


def slopes(
    critic: Callable[[Any], Any], real: Samples, fake: Samples, seed: int
) -> dict[str, Tensor]:
    """Return the slopes ‖∇D‖ of a critic on real samples, fake samples and interpolates.

    If the critic returns several scores per sample, it is the slope of their mean, summed over the
    scales of a list. The forward
    passes change no buffers and no random number generator, and leave no graph.

    Args:
        critic: ``[B, *S] -> [B, ...]``.
        real: real samples x, ``[B, *S]``; or a dict, then n is the norm over all of its
            floating-point entries.
        fake: fake samples y, likewise.
        seed: for the interpolates α x + (1 − α) y, with one α ~ U[0, 1] per sample.

    Returns:
        The slopes ``[B]`` by the names "real", "fake" and "interpolates".

    >>> critic = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> slopes(critic, torch.ones(2, 2), torch.zeros(2, 2), seed=0)["interpolates"]
    tensor([5., 5.])
    """
    xs, ys = floating(real), floating(fake)
    device = first(real).device
    rng = torch.Generator(device).manual_seed(seed)
    x, y = (tuple(t.detach() for t in points.values()) for points in (xs, ys))
    between = dict(zip(xs, interpolate()(x, y, rng), strict=True))
    found = {}
    for name, points in {"real": xs, "fake": ys, "interpolates": between}.items():
        with torch.enable_grad():
            at = {key: t.detach().requires_grad_() for key, t in points.items()}
            with isolated(critic, derived_seed(seed, name), device, twice=False):
                scores = joined(critic(at_points(fake if name == "fake" else real, at)))
            means = scores.reshape(len(scores), -1).mean(1)
            squares = [input_norms(means, t).square() for t in at.values()]
            found[name] = sum(squares[1:], squares[0]).sqrt()
    return found


def optimality(
    loss: GANLoss,
    real_scores: Scored,
    fake_scores: Scored,
    penalties: Iterable[tuple[Any, Terms | None]],
) -> Tensor:
    r"""Return the derivative of a critic's objective along its own scale: zero at the optimum.

    A net D whose last layer is linear can become sD for every s > 0. At the optimum of its loss L
    and penalties P_k = λ_k E form_k(n) the derivative in s is therefore zero. A norm n of D's
    derivatives, of any order, becomes s n for sD, so that

    .. math:: \text{optimality} = -\frac{d}{ds}\Big|_{s=1} \Big(L(sD) + \sum_k P_k(sD)\Big)
              = -\frac{d}{ds}\Big|_{s=1} L(sD) - \sum_k \lambda_k \, E[n \, \text{form}_k'(n)].

    It is positive if a steeper critic would have a lower objective. For the Wasserstein loss the
    first term is E D(x) − E D(y). The second is 2λ E[n(n − 1)] for the penalty λ(n − 1)²;
    2λ E[n max(0, n − 1)] for λ max(0, n − 1)²; γ E[n²] for (γ/2) n²; and λp E[n^p] for λ n^p. With
    the penalty λ(n − 1)² and the same slope n everywhere, the optimum is n = 1 + W/2λ, and
    E D(x) − E D(y) = nW: divided by the slope it is the Wasserstein distance W.

    Args:
        loss: L.
        real_scores: D(x), ``[B, ...]``.
        fake_scores: D(y), ``[B, ...]``.
        penalties: each with its terms on this critic, or None if its weight is zero. They must be
            of the kind of `scales_with_critic`. A lazy penalty counts with its mean weight.

    Returns:
        One number, in the units of the loss. It has no graph.

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
        device = joined(real_scores).device
        s = torch.ones((), dtype=torch.float64, device=device, requires_grad=True)
        real, fake = (
            tree_map_only(Tensor, lambda t: s * t.detach().to(torch.float64), scores)
            for scores in (real_scores, fake_scores)
        )
        total = over_scales(loss.critic, real, fake)
        for penalty, terms in penalties:
            if terms is not None:
                squared_norms = s.square() * terms.squared_norms.detach().to(torch.float64)
                lazy = formula.terms(penalty, squared_norms, terms.weight / penalty.every)
                total = lazy.added_to(total)
        (derivative,) = torch.autograd.grad(total, s)
    return -derivative


def scales_with_critic(penalty: Penalty) -> bool:
    """Whether a penalty's norms are of derivatives of the critic's output in its input."""
    needs = needs_of(penalty)
    inside = needs.in_weights or needs.environments or needs.activations
    return not inside and penalty.axes()["of"] != "sampled_loss"


def center(penalties: Iterable[Penalty]) -> float:
    """Return the centre c of the first penalty whose form has one; 1 if none has."""
    centers = (getattr(p.axes().get("form"), "c", None) for p in penalties)
    return next((c for c in centers if c is not None), 1.0)


def slope_statistics(
    penalties: Mapping[str, Penalty], slopes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the scalars that are logged about slopes.

    Args:
        penalties: of the critic, by name.
        slopes: from `slopes`, ``[B]`` each.

    Returns:
        For each kind of points ``slope/<points>``, the mean; ``slope/<points>/max``; and
        ``slope/<points>/above_center``, the fraction of slopes above `center`.
    """
    scalars = {}
    for points, n in slopes.items():
        scalars[f"slope/{points}"] = n.mean()
        scalars[f"slope/{points}/max"] = n.amax()
        above = n > center(penalties.values())
        scalars[f"slope/{points}/above_center"] = above.to(n.dtype).mean()
    return scalars


def wasserstein(
    real_scores: Scored, fake_scores: Scored, slopes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return two estimates of the Wasserstein distance W₁ between real and fake samples.

    Args:
        real_scores: D(x), ``[B, ...]``.
        fake_scores: D(y), ``[B, ...]``.
        slopes: from `slopes`.

    Returns:
        ``wasserstein/raw``, E D(x) − E D(y); and ``wasserstein/debiased``, the same divided by the
        mean slope on interpolates, or 0 if that is 0.
    """
    raw = over_scales(mean_score_gap, real_scores, fake_scores)
    slope = slopes["interpolates"].mean()
    debiased = torch.where(slope > 0, raw / slope, raw * 0)
    return {"wasserstein/raw": raw, "wasserstein/debiased": debiased}
