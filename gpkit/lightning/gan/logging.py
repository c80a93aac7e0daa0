"""The scalars that are logged about a critic: losses, slopes, optimality, Wasserstein estimates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gpkit.formula import Terms
from gpkit.lightning.gan.losses import WASSERSTEIN, GANLoss
from gpkit.lightning.gan.scores import Scores, conditioned
from gpkit.lightning.gan.slopes import (
    optimality,
    scales_with_critic,
    slope_statistics,
    slopes,
    wasserstein,
)
from gpkit.penalty import Penalty


def optimality_scalars(
    loss: GANLoss,
    penalties: Mapping[str, Penalty],
    scores: Scores,
    terms: Mapping[str, Terms | None],
    step: int,
) -> dict[str, Tensor]:
    """Return ``critic_optimality``, see `optimality`.

    It needs the norms of all penalties, and norms that scale with the critic.

    Args:
        loss: of the critic.
        penalties: of the critic, by name.
        scores: of one micro-batch.
        terms: of the penalties on this micro-batch.
        step: the number of the critic's step.

    Returns:
        The scalar by its name; an empty dict if a penalty does not act on this step, has steps of
        its own, or has other norms.
    """
    for name, penalty in penalties.items():
        if name not in terms or not scales_with_critic(penalty) or step % penalty.every:
            return {}
    pairs = [(penalty, terms[name]) for name, penalty in penalties.items()]
    return {"critic_optimality": optimality(loss, *scores.both(), pairs)}


def slope_scalars(
    critic: nn.Module,
    loss: GANLoss,
    penalties: Mapping[str, Penalty],
    scores: Scores,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scalars about the slopes of a critic, and the slopes.

    Args:
        critic: D.
        loss: of the critic. The Wasserstein loss has Wasserstein estimates as well.
        penalties: of the critic, by name.
        scores: of one micro-batch.
        seed: for the interpolates.

    Returns:
        Scalars by name, and the slopes ``[B]`` by kind of points, see `slopes`.
    """
    found = slopes(conditioned(critic, scores.labels), scores.real, scores.fake, seed)
    scalars = slope_statistics(penalties, found)
    if loss is WASSERSTEIN:
        scalars |= wasserstein(*scores.both(), found)
    return scalars, found


def evaluation_scalars(
    critic: nn.Module, loss: GANLoss, scores: Scores, seed: int
) -> dict[str, Tensor]:
    """Return the scalars at validation and test: both losses, and Wasserstein estimates.

    Args:
        critic: D.
        loss: of both nets. Only the Wasserstein loss has Wasserstein estimates.
        scores: of one batch.
        seed: for the interpolates.

    Returns:
        Scalars by name.
    """
    scalars = {
        "critic_loss": loss.critic(*scores.both()),
        "generator_loss": loss.generator(*scores.both()),
    }
    if loss is WASSERSTEIN:
        found = slopes(conditioned(critic, scores.labels), scores.real, scores.fake, seed)
        scalars |= wasserstein(*scores.both(), found)
    return scalars
