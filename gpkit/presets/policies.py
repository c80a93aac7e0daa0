"""Penalties of reinforcement learning: of a policy in the states, and of a critic of motions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.form import squared
from gpkit.axes.mixtures import mixture
from gpkit.axes.weight import Schedule
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lipschitz_policy(weight: float | Schedule = 0.002, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the gradient of an action's log-probability in the state, for smooth policies.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla_{s_i} \log \pi(a_i | s_i)\|^2

    Call ``penalty(lambda s: policy(s).log_prob(a).sum(1), s)`` with states ``[B, *S]`` and the
    actions that were taken, as constants; or ``penalty(log_probs, s)`` with log-probabilities
    ``[B]`` of an ``s`` that requires grad. The derivative is in what you pass: normalised
    observations, if the policy gets those. For a ~ N(Ws, σ²I) the expected value of n² is
    ‖W‖_F²/σ².

    Args:
        weight: λ, the paper's λ: there is no ½ inside.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Chen et al. (2024), arXiv:2410.11825.

    >>> import torch
    >>> W, s = torch.tensor([[6.0, 8.0]]), torch.zeros(200_000, 2)
    >>> a = 2 * torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))  # σ = 2
    >>> policy = lambda s: torch.distributions.Normal(s @ W.T, 2.0)
    >>> value = lipschitz_policy(weight=1.0)(lambda s: policy(s).log_prob(a).sum(1), s)
    >>> round(value.item())  # ‖W‖²/σ² = 100/4
    25
    """
    return preset("lipschitz_policy", weight, Axes(of="loss", wrt="input", form=squared()), axes)


def amp(weight: float | Schedule = 5.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise a motion critic's gradient on demonstrations and on the agent's motions.

    .. math:: \frac w2 \, \text{mean}_i \, \|\nabla D(x_i)\|^2
              + \frac w2 \, \text{mean}_j \, \|\nabla D(y_j)\|^2

    Call ``penalty(critic, real=demonstrations, fake=agent)`` with transitions ``[B, *S]`` and
    ``[C, *S]``, which need not be as many: each kind has the mean of its own. The derivative is in
    what you pass: pass normalised observations; or if the critic normalises them in a submodule,
    choose ``wrt=gpkit.activation("normalizer")``. On demonstrations alone, as in the paper's
    formula, it is `r1` with the same weight.

    Args:
        weight: w, the paper's gradient penalty weight: the ½ is inside.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Peng et al. (2021), arXiv:2104.02180.

    >>> import torch
    >>> x, y = torch.full((4, 1), 2.0), torch.full((12, 1), 4.0)
    >>> value = amp(weight=1.0)(lambda x: (x**2).sum(1) / 2, real=x, fake=y)
    >>> round(value.item(), 4)  # ½·2² + ½·4²
    10.0
    """
    at = mixture("real", "fake", balanced=True)  # w times the mean of the two means
    return preset("amp", weight, Axes(wrt="input", form=squared(), at=at), axes)
