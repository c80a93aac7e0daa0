"""Statistics of the gradients in each environment of a batch, for `EnvironmentPenalty`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.distributed import means_of_ranks
from gpkit.autodiff.tracing.calls import afterwards, holds, outside


@dataclass(frozen=True)
class Samples:
    """The samples of a batch with E environments, as passed to a `Statistic`.

    Args:
        outputs: the logits f, ``[B, C]``.
        deltas: δ_i = ∂ℓ_i/∂f_i, ``[B, C]``, differentiable.
        features: a, the input of the last linear layer, ``[B, d]``; or None.
        members: ``[E, B]``: 1 / n_e if sample i is in environment e (of n_e samples), else 0. Its
            product with values ``[B, ...]`` is their mean over each environment.
        names: the E environments, as integers, in the order of ``members``.
        trains: whether the values are trained on: then the state of a statistic is updated.
    """

    outputs: Tensor
    deltas: Tensor
    features: Tensor | None
    members: Tensor
    names: tuple[int, ...] = ()
    trains: bool = False


class Statistic:
    """A statistic of the gradients in each environment of a batch. The base class.

    A subclass defines one method, ``__call__``. If it has ``state_dict`` and ``load_state_dict``,
    its state is saved with the penalty's.

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
        """Return n² and the values, ``[E]``: n², or the product of two halves."""
        slopes = (samples.deltas * samples.outputs).sum(1)  # [B]
        members = samples.members
        whole = members @ slopes
        values = whole.square()
        if self.halves:
            inside = members > 0
            odd = inside & (inside.cumsum(1) % 2 == 1)
            parts = torch.stack([odd, inside & ~odd]).to(members)  # [2, E, B]
            counts = parts.sum(2, keepdim=True)
            if not (holds(counts.all) or counts.all()):
                raise ValueError(
                    "`halves=True` needs at least two samples of every environment in a batch; got "
                    f"environments of {[int(n) for n in inside.sum(1)]}"
                )
            values = ((parts / counts) @ slopes).prod(0)
        return whole.square(), values


@dataclass
class gradient_variance(Statistic):
    r"""The spread of the variances of the per-sample gradients of the last linear layer ω.

    .. math:: \frac{1}{|\omega|} \Big\|\hat v_e - \text{mean}_{e'} \hat v_{e'}\Big\|^2, \quad
              \hat v_e = v_e + \frac{\gamma}{1 - \gamma} m_e

    The gradient is δ_i ⊗ a_i for the weight, and δ_i for the bias. Its variance v_e has an entry
    for each of ω: the mean of the square over an environment minus the square of the mean. m_e is
    the moving average of v_e before this call, a constant, from 0 on. So v̂_e is the new moving
    average γ m_e + (1 - γ) v_e, divided by 1 - γ: then its gradient does not depend on γ.

    In a distributed run the moving average is that of the mean of v_e over the ranks that have the
    environment, so that all ranks have the same one; each rank must make the same calls. A variance
    that is not finite is left out of it. Do not share one object between penalties.

    Args:
        ema: γ in [0, 1); 0 is without a moving average.

    Raises:
        ValueError: if ``ema`` is not in [0, 1).
    """

    ema: float = 0.0
    averages: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    features = True

    def __post_init__(self) -> None:
        if checks.number("gradient_variance(ema=...)", self.ema, 0) >= 1:
            raise ValueError(
                f"`gradient_variance(ema=...)` must be a number in [0, 1); got {self.ema!r}"
            )

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the values ``[E]``, twice: n² is the value itself."""
        deltas, members, a = samples.deltas, samples.members, samples.features
        assert a is not None
        a = torch.cat([a, torch.ones_like(a[:, :1])], 1)  # [B, d + 1]: ones for the bias
        means = torch.einsum("eb,bc,bd->ecd", members, deltas, a)
        squares = torch.einsum("eb,bc,bd->ecd", members, deltas.square(), a.square())
        variances = squares - means.square()
        averaged = self._with_average(samples.names, variances)
        if samples.trains and self.ema:
            afterwards(partial(self._update, samples.names), variances)
        values = (averaged - averaged.mean(0)).square().mean((1, 2))
        return values, values

    def _with_average(self, names: tuple[int, ...], variances: Tensor) -> Tensor:
        """Return v_e + γ/(1 - γ) m_e, ``[E, C, d + 1]``."""
        if not self.ema:
            return variances
        zero = torch.zeros_like(variances[0])
        return variances + self.ema / (1 - self.ema) * outside(partial(self._before, names, zero))

    def _before(self, names: tuple[int, ...], zero: Tensor) -> Tensor:
        """Return the moving averages m_e, ``[E, C, d + 1]``, in the dtype of their zero."""
        before = [self.averages.get(name, zero) for name in names]
        for name, m in zip(names, before, strict=True):
            if m.shape != zero.shape:
                raise ValueError(
                    f"the moving average of environment {name} is of a last layer "
                    f"{list(m.shape)} (outputs, inputs + 1), this one is "
                    f"{list(zero.shape)}: use a penalty of its own for each net"
                )
        return torch.stack([m.to(zero) for m in before])

    def _update(self, names: tuple[int, ...], variances: Tensor) -> None:
        """Update the moving averages: m ← γ m + (1 - γ) v."""
        for name, v in means_of_ranks(dict(zip(names, variances, strict=True))).items():
            m = self.averages.get(name, torch.zeros_like(v)).to(v)
            new = self.ema * m + (1 - self.ema) * v
            self.averages[name] = torch.where(v.isfinite().all(), new, m)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving average of each environment as plain numbers, or {} if none is."""
        averages = {name: m.tolist() for name, m in self.averages.items()}
        return {"averages": averages} if averages else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the moving averages."""
        given = state.get("averages", {})  # JSON makes strings of the environments
        self.averages = {int(e): torch.tensor(m, dtype=torch.float64) for e, m in given.items()}
