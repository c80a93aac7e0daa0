"""Statistics of the gradients in each environment of a batch, for `EnvironmentPenalty`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """The samples of a batch with E environments, as passed to a `Statistic`.

    Args:
        outputs: the logits f, ``[B, C]``.
        deltas: δ_i = ∂ℓ_i/∂f_i, ``[B, C]``, differentiable.
        features: a, the input of the last linear layer, ``[B, d]``; or None.
        members: ``[E, B]``: 1 / n_e if sample i is in environment e (of n_e samples), else 0. Its
            product with values ``[B, ...]`` is their mean over each environment.
    """

    outputs: Tensor
    deltas: Tensor
    features: Tensor | None
    members: Tensor


class Statistic:
    """A statistic of the gradients in each environment of a batch. The base class.

    A subclass defines one method, ``__call__``.

    >>> class mean_slope(Statistic):  # the squared mean of δ in each environment
    ...     def __call__(self, samples):
    ...         values = (samples.members @ samples.deltas).square().sum(1)
    ...         return values, values
    >>> delta, members = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5, 0.5]])  # E = 1
    >>> mean_slope()(Samples(torch.zeros(2, 1), delta, None, members))[1]
    tensor([4.])
    """

    features = False  # whether it uses the features: then the penalty needs (logits, features)

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return n² ``[E]`` and the values ``[E]`` to penalise, one for each environment."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(samples)")


@dataclass(frozen=True)
class scale_gradient(Statistic):
    """(d/dw R_e(w f) at w = 1)²: the derivative is the mean of ⟨δ_i, f_i⟩ over environment e.

    Args:
        halves: use the product of the derivatives of two halves of each environment, which is
            unbiased. The square has a bias: the variance of ⟨δ_i, f_i⟩ divided by n_e.
    """

    halves: bool = False

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return n² and E times the values, ``[E]``: their mean is the sum over environments."""
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
    """‖Var_e - mean over e' of Var_e'‖², of the per-sample gradients of the last linear layer.

    The gradient is δ_i ⊗ a_i for the weight, and δ_i for the bias. The variance of each entry over
    an environment is the mean of its square minus the square of its mean.
    """

    features = True

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the values ``[E]``, twice: n² is the value itself."""
        deltas, members, a = samples.deltas, samples.members, samples.features
        assert a is not None
        a = torch.cat([a, torch.ones_like(a[:, :1])], 1)  # [B, d + 1]: ones for the bias
        means = torch.einsum("eb,bc,bd->ecd", members, deltas, a)
        squares = torch.einsum("eb,bc,bd->ecd", members, deltas.square(), a.square())
        variances = squares - means.square()
        values = (variances - variances.mean(0)).square().sum((1, 2))
        return values, values
