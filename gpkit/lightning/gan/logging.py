"""What is logged of a critic: losses, slopes, its optimality, and Wasserstein estimates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gpkit.formula import Terms
from gpkit.lightning.gan.losses import WASSERSTEIN, GANLoss
from gpkit.lightning.gan.scores import Scores, conditioned
from gpkit.lightning.gan.slopes import (
    described,
    optimality,
    scales_with_critic,
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
    """Return ``critic_optimality``, where it can be told: all penalties act, and on the scores.

    Args:
        loss: of the critic.
        penalties: of the critic, by name.
        scores: of a batch.
        terms: of the penalties on it.
        step: the critic's own step.

    Returns:
        Numbers by name; none where it cannot be told.
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
    """Return what slopes tell about a critic, and the slopes.

    Args:
        critic: D.
        loss: of the critic.
        penalties: of the critic, by name.
        scores: of a batch.
        seed: of the interpolates.

    Returns:
        Numbers by name, and slopes ``[B]`` by where they are.
    """
    steep = slopes(conditioned(critic, scores.labels), scores.real, scores.fake, seed)
    numbers = described(penalties, steep)
    if loss is WASSERSTEIN:
        numbers |= wasserstein(*scores.both(), steep)
    return numbers, steep


def evaluation_scalars(
    critic: nn.Module, loss: GANLoss, scores: Scores, seed: int
) -> dict[str, Tensor]:
    """Return what is logged at validation and test: the losses and Wasserstein estimates."""
    numbers = {
        "critic_loss": loss.critic(*scores.both()),
        "generator_loss": loss.generator(*scores.both()),
    }
    if loss is WASSERSTEIN:
        steep = slopes(conditioned(critic, scores.labels), scores.real, scores.fake, seed)
        numbers |= wasserstein(*scores.both(), steep)
    return numbers
