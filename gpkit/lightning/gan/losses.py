"""GAN losses as functions of the critic's scores of real and fake samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import relu, softplus

from gpkit import checks

Scored = Tensor | list[Tensor]  # scores [B, ...]; a multi-scale critic has one tensor a scale


@dataclass(frozen=True)
class GANLoss:
    """A loss for the critic and a loss for the generator.

    The critic's loss must push the scores of real samples up and those of fake samples down, and
    the generator's loss those of fake samples up.

    The loss of a critic that returns a list of scores is the sum of the losses of its scales.

    Args:
        critic: ``(real scores, fake scores) -> loss``, with scores ``[B, ...]`` and one number as
            the loss.
        generator: the same for the generator. Its gradient flows through the fake scores.
        paired: whether the generator's loss needs the real scores; if not, they are None.

    >>> import torch
    >>> least_squares = GANLoss(
    ...     critic=lambda real, fake: (real - 1).square().mean() + fake.square().mean(),
    ...     generator=lambda real, fake: (fake - 1).square().mean(),
    ... )
    >>> least_squares.critic(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])).item()
    4.0
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Any, Tensor], Tensor]
    paired: bool = False


def over_scales(loss: Callable[[Any, Tensor], Tensor], real: Scored | None, fake: Scored) -> Tensor:
    """Return a loss of scores; for lists of scores the sum of the losses of all scales.

    >>> import torch
    >>> one, two = torch.ones(4), torch.full((4, 3), 2.0)
    >>> over_scales(mean_score_gap, [two, two], [one, one]).item()
    2.0
    """
    if isinstance(fake, Tensor):
        return loss(real, fake)
    reals = [None] * len(fake) if real is None else real
    parts = [loss(a, b) for a, b in zip(reals, fake, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def mean_score_gap(real: Tensor, fake: Tensor) -> Tensor:
    """Return E D(x) − E D(y). Its supremum over 1-Lipschitz critics is the Wasserstein distance."""
    return real.mean() - fake.mean()


def _wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    return -mean_score_gap(real, fake)


def _raise_score(real: Tensor | None, fake: Tensor) -> Tensor:
    return -fake.mean()


def _logistic_critic(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


def _logistic_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    return softplus(-fake).mean()


def _minimax_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    return -softplus(fake).mean()


def _hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    return relu(1 - real).mean() + relu(1 + fake).mean()


def _relativistic_critic(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(fake - real).mean()


def _relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(real - fake).mean()


WASSERSTEIN = GANLoss(_wasserstein_critic, _raise_score)


LOSSES = {
    "wasserstein": WASSERSTEIN,
    "non_saturating": GANLoss(_logistic_critic, _logistic_generator),
    "minimax": GANLoss(_logistic_critic, _minimax_generator),
    "hinge": GANLoss(_hinge_critic, _raise_score),
    "relativistic": GANLoss(_relativistic_critic, _relativistic_generator, paired=True),
}


def gan_loss(loss: str | GANLoss) -> GANLoss:
    r"""Return the GAN loss with a name; a `GANLoss` is returned unchanged.

    With a = D(x) for real samples, b = D(y) for fake samples, f(t) = log(1 + e^t) and E the mean
    over all entries of the scores, the losses of the critic and of the generator are

    ================  ==================================  ==============
    wasserstein       −E a + E b                          −E b
    non_saturating    E f(−a) + E f(b)                    E f(−b)
    minimax           E f(−a) + E f(b)                    −E f(b)
    hinge             E max(0, 1 − a) + E max(0, 1 + b)   −E b
    relativistic      E f(−(a − b)), in pairs             E f(−(b − a))
    ================  ==================================  ==============

    Args:
        loss: one of these names, or a `GANLoss`.

    Returns:
        The loss.

    Raises:
        ValueError: if the name is none of these.
        TypeError: if ``loss`` is neither a name nor a `GANLoss`.

    Sources: Arjovsky et al. (2017), arXiv:1701.07875 (wasserstein); Goodfellow et al. (2014),
    arXiv:1406.2661 (non_saturating and minimax); Lim and Ye (2017), arXiv:1705.02894 (hinge);
    Huang et al. (2024), arXiv:2501.05441 (relativistic).

    >>> import torch
    >>> gan_loss("hinge").critic(torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])).item()
    1.25
    """
    if isinstance(loss, GANLoss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"`loss=...` must be a name or a GANLoss; got {loss!r}")
    return LOSSES[checks.choice("loss=...", loss, LOSSES)]
