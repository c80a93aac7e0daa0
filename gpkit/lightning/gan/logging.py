"""The scalars that are logged about a critic: losses, slopes, optimality, Wasserstein estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import tree_map_only
from gpkit.autodiff.random import seeded
from gpkit.formula import Terms
from gpkit.lightning.gan.losses import WASSERSTEIN, GANLoss, over_scales
from gpkit.lightning.gan.samples import conditioned, first, unpack_samples
from gpkit.lightning.gan.scores import Scores, scores_of
from gpkit.lightning.gan.slopes import (
    optimality,
    scales_with_critic,
    slope_statistics,
    slopes,
    wasserstein,
)
from gpkit.lightning.recording import EVALUATION
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
    assert scores.fake is not None
    f = conditioned(critic, scores.labels, scores.real)
    found = slopes(f, scores.real, scores.fake, seed)
    scalars = slope_statistics(penalties, found)
    if loss is WASSERSTEIN:
        scalars |= wasserstein(*scores.both(), found)
    return scalars, found


def evaluation_scalars(module: Any, batch: Any, seed: int) -> dict[str, Tensor]:
    """Return the scalars at validation and test: both losses, and Wasserstein estimates.

    Args:
        module: the `GANModule`. Only the Wasserstein loss has Wasserstein estimates.
        batch: of the data.
        seed: for the latents and the interpolates.

    Returns:
        Scalars by name.
    """
    critic, loss, objectives = module.critic, module.loss, module.objectives
    # Slopes need a graph: leave inference mode, and clone its tensors.
    with torch.inference_mode(False), torch.no_grad():
        batch = tree_map_only(Tensor, Tensor.clone, batch)
        with seeded(seed, module.device):
            samples = objectives.samples(unpack_samples(batch, conditional=module.conditional))
        scores = scores_of(critic, samples, [])
        scalars = {
            "critic_loss": over_scales(loss.critic, *scores.both()),
            "generator_loss": over_scales(loss.generator, *scores.both()),
        }
        if loss is WASSERSTEIN:
            assert scores.fake is not None
            f = conditioned(critic, scores.labels, scores.real)
            found = slopes(f, scores.real, scores.fake, seed)
            scalars |= wasserstein(*scores.both(), found)
    return scalars


def log_evaluation(module: Any, batch: Any, seed: int, stage: str) -> None:
    """Log the losses and Wasserstein estimates of a batch.

    Args:
        module: a `GANModule`.
        batch: of samples.
        seed: for the latents.
        stage: "val" or "test".
    """
    size = len(first(unpack_samples(batch, conditional=module.conditional).samples))
    for name, scalar in evaluation_scalars(module, batch, seed).items():
        module.log(f"{stage}/{name}", scalar, batch_size=size, **EVALUATION)
