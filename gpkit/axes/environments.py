"""Penalties on how the environments of a batch differ: statistics of their samples' gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """The samples of a batch, as the statistics of its environments see them.

    Args:
        outputs: f, ``[B, C]``.
        deltas: δ_i = ∂ℓ_i/∂f_i, ``[B, C]``, differentiable.
        features: a, what the last linear layer was given, ``[B, d]``; or None.
        members: ``[E, B]``: 1 / n_e where sample i is of environment e, else 0: times any
            values ``[B, ...]`` it is their mean over each environment.
    """

    outputs: Tensor
    deltas: Tensor
    features: Tensor | None
    members: Tensor


class Statistic:
    """A statistic of the gradients of a batch's environments: the base class, with one method."""

    features = False  # whether it takes the features: then f is the pair (logits, features)

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return n² and values, one for each environment: ``[E]``."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(samples)")


@dataclass(frozen=True)
class scale_gradient(Statistic):
    """(d/dw R_e(w f) at w = 1)², where the derivative is the mean over e of ⟨δ_i, f_i⟩.

    Args:
        halves: take the product of the derivatives over two halves of each environment, which has
            no bias; else the square, whose expectation is greater by the variance over n_e.
    """

    halves: bool = False

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return ``[E]``; E times the squares, for their mean to be the sum over environments."""
        slopes = (samples.deltas * samples.outputs).sum(1)  # [B]
        members, whole = samples.members, samples.members @ slopes
        values = whole.square()
        if self.halves:
            inside = members > 0
            odd = inside & (inside.cumsum(1) % 2 == 1)
            parts = torch.stack([odd, inside & ~odd]).to(members)  # [2, E, B]
            counts = parts.sum(2, keepdim=True)
            if not counts.all():
                raise ValueError(
                    "`halves=True` needs at least two samples of every environment in a batch; got "
                    f"environments of {[int(n) for n in inside.sum(1)]}"
                )
            values = ((parts / counts) @ slopes).prod(0)
        return whole.square(), len(members) * values


@dataclass(frozen=True)
class gradient_variance(Statistic):
    """‖Var_e - mean over e' of Var_e'‖², of the samples' gradients in the last linear layer.

    That of its weight is δ_i ⊗ a_i, that of its bias δ_i; the variance of each entry is the mean
    square minus the squared mean, over the samples of an environment.
    """

    features = True

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return ``[E]``."""
        deltas, members, a = samples.deltas, samples.members, samples.features
        assert a is not None
        a = torch.cat([a, torch.ones_like(a[:, :1])], 1)  # [B, d + 1]: the bias's is 1
        means = torch.einsum("eb,bc,bd->ecd", members, deltas, a)
        squares = torch.einsum("eb,bc,bd->ecd", members, deltas.square(), a.square())
        variances = squares - means.square()
        values = (variances - variances.mean(0)).square().sum((1, 2))
        return values, values
