"""Losses of GANs: what a critic's scores of real and fake samples are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import relu, softplus

from gpkit import checks


@dataclass(frozen=True)
class GANLoss:
    """A loss of the critic and one of the generator. Real samples are to have the higher scores.

    Args:
        critic: ``(scores of real, scores of fake) -> loss``, each ``[B, ...]``.
        generator: the same of the generator, trained through the scores of the fake ones.
        paired: whether the generator's loss asks for the scores of real samples; if not, these
            come as None.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Any, Tensor], Tensor]
    paired: bool = False


def gap(real: Tensor, fake: Tensor) -> Tensor:
    """Return E D(x) − E D(y), which a critic of slope one raises to a Wasserstein distance."""
    return real.mean() - fake.mean()


def _wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    return -gap(real, fake)


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
    r"""Return the loss of a name, or one of your own as it is.

    With a = D(x) of real and b = D(y) of fake samples, f(t) = log(1 + e^t), and means over all
    entries of the scores, the critic's and the generator's losses are

    ================  ==================================  ==============
    wasserstein       −E a + E b                          −E b
    non_saturating    E f(−a) + E f(b)                    E f(−b)
    minimax           E f(−a) + E f(b)                    −E f(b)
    hinge             E max(0, 1 − a) + E max(0, 1 + b)   −E b
    relativistic      E f(−(a − b)), in pairs             E f(−(b − a))
    ================  ==================================  ==============

    Args:
        loss: a name, or a `GANLoss`.

    Returns:
        The loss.

    Raises:
        ValueError: if a name is none of these.
        TypeError: if it is of another kind.

    Sources: Arjovsky et al. (2017), arXiv:1701.07875; Goodfellow et al. (2014), arXiv:1406.2661,
    for two; Lim and Ye (2017), arXiv:1705.02894; Huang et al. (2024), arXiv:2501.05441.

    >>> import torch
    >>> gan_loss("hinge").critic(torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0])).item()
    1.25
    """
    if isinstance(loss, GANLoss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"`loss=...` must be a name or a GANLoss; got {loss!r}")
    return LOSSES[checks.choice("loss=...", loss, LOSSES)]
