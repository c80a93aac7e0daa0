"""Penalties on how the environments of a batch differ: statistics of their samples' gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from gpkit import graphs
from gpkit.derivatives import gradients
from gpkit.evaluation import device_of
from gpkit.isolation import isolated
from gpkit.penalty import GradientPenalty, Terms
from gpkit.schedules import Schedule
from gpkit.targets import Target, wide

Losses = Callable[[Tensor, Tensor], Tensor]


class Options(TypedDict, total=False):
    """What an environment penalty takes beside its statistic and its weight."""

    loss: Losses | None
    every: int
    seed: int | None
    name: str


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


class Statistic(Protocol):
    """A statistic of the environments' gradients."""

    features: bool  # whether it takes the features: then f is the pair (logits, features)

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return n² and values, one for each environment: ``[E]``."""


@dataclass(frozen=True)
class scale_gradient:  # noqa: N801
    """(d/dw R_e(w f) at w = 1)², where the derivative is the mean over e of ⟨δ_i, f_i⟩.

    Args:
        halves: take the product of the derivatives over two halves of each environment, which has
            no bias; else the square, whose expectation is greater by the variance over n_e.
    """

    halves: bool = False

    features = False

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
class gradient_variance:  # noqa: N801
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


class EnvironmentPenalty(GradientPenalty):
    r"""A penalty on a statistic of the gradients of a batch's environments.

    .. math:: \lambda(t) \; \frac1E \sum_e \mathrm{statistic}_e

    Called ``penalty(logits, y, env)``: logits ``[B, C]`` and classes ``[B]``, or logits ``[B]`` or
    ``[B, 1]`` and targets in {0, 1} of their number; env ``[B]``, integers that name each sample's
    environment. Or ``penalty([(logits_1, y_1), (logits_2, y_2), ...])``, one pair for each. A
    callable instead of the logits is called for them. A statistic of the last linear layer takes
    ``(logits, features)`` for logits: `features` gives both.

    Args:
        statistic: of the environments.
        loss: ``(logits, y) -> [B]``; None is the cross-entropy, the logistic one for one logit.
        weight: λ >= 0, or a schedule.
        every: act on every k-th step, with the weight multiplied by k.
        seed: of the random numbers of a callable's forward.
        name: what it is called in logs.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        statistic: Statistic,
        *,
        loss: Losses | None = None,
        weight: float | Schedule = 1.0,
        every: int = 1,
        seed: int | None = None,
        name: str = "environments",
    ) -> None:
        super().__init__(wrt="weight", weight=weight, every=every, seed=seed, name=name)
        self.statistic = statistic
        self.loss = loss or cross_entropies

    def __repr__(self) -> str:
        return f"EnvironmentPenalty({self.statistic!r}, weight={self.weight!r}, every={self.every})"

    def _evaluate(
        self,
        f: Any,
        args: tuple[Any, ...],
        real: Any,
        fake: Any,
        weight: float,
        scale: Tensor | float | None = None,
        *,
        observe: bool = False,
    ) -> tuple[Terms, list[Target]]:
        # δ is taken in float32, from the logits alone: no scale keeps it from rounding to zero.
        train, seed = torch.is_grad_enabled(), self.next_seed()
        if real is not None or fake is not None:
            raise TypeError(f"{self.name} takes no real= or fake=: {USAGE}")
        with torch.inference_mode(False), torch.enable_grad():
            with isolated(f, seed, device_of(f, args)):
                output, y, env = self._read(f, args)
            logits, a = self._split(output)
            if train and not logits.requires_grad:
                raise RuntimeError(CUT)
            samples = self._samples(logits, a, y, env)
            n2, values = self.statistic(samples)
            terms = Terms(n2, values, weight, values.mean())
        return terms if train else terms.detached(), []

    def _read(self, f: Any, args: tuple[Any, ...]) -> tuple[Any, Tensor, Tensor]:
        """Return outputs, targets and environments of a call, whichever way it was written."""
        if len(args) == 2:
            y, env = args
            f = f() if callable(f) else f
        elif not args and isinstance(f, (list, tuple)) and all(len(pair) == 2 for pair in f):
            outputs = [output() if callable(output) else output for output, _ in f]
            y = torch.cat([y for _, y in f])
            sizes = torch.tensor([len(y) for _, y in f], device=y.device)
            env = torch.arange(len(f), device=y.device).repeat_interleave(sizes)
            pairs = [o if isinstance(o, (list, tuple)) else (o,) for o in outputs]
            f = tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
            f = f[0] if len(f) == 1 else f
        else:
            raise TypeError(f"got {len(args)} arguments after the logits: {USAGE}")
        for name, tensor in (("y", y), ("env", env)):
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                raise TypeError(f"{name} must be a tensor [B]; got a {type(tensor).__name__}")
        if env.ndim != 1 or env.is_floating_point():
            raise ValueError(
                f"env must be integers [B], the environment of each sample; got "
                f"{env.dtype} {list(env.shape)}"
            )
        return f, y, env

    def _split(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """Return logits ``[B, C]`` or ``[B]``, and features ``[B, d]`` where they are needed."""
        if not self.statistic.features:
            output = (output, None)
        if not isinstance(output, (list, tuple)) or len(output) != 2:
            raise TypeError(
                f"{self.name} takes (logits, features), which gpkit.features(net, x) gives; got a "
                f"{type(output).__name__}"
            )
        logits, a = output
        if not isinstance(logits, Tensor) or logits.ndim not in (1, 2):
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"logits must be a tensor [B, C] or [B]; got {found}")
        if a is not None and (not isinstance(a, Tensor) or a.ndim != 2 or len(a) != len(logits)):
            found = list(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise TypeError(f"features must be a tensor [{len(logits)}, d]; got {found}")
        return logits, a

    def _samples(self, logits: Tensor, a: Tensor | None, y: Tensor, env: Tensor) -> Samples:
        logits = logits.to(wide(logits))
        if not len(logits) == len(y) == len(env):
            raise ValueError(
                "logits, y and env must have one entry for every sample; got "
                f"{len(logits)}, {len(y)} and {len(env)}"
            )
        if not logits.requires_grad:
            logits = logits.detach().clone().requires_grad_()  # without grad mode, for δ alone
        with torch.autocast(logits.device.type, enabled=False):
            losses = self.loss(logits, y)
            if losses.shape != logits.shape[:1]:
                raise ValueError(
                    f"`loss=...` must give one loss per sample, [{len(logits)}]; got "
                    f'{list(losses.shape)}: use reduction="none"'
                )
            if not losses.requires_grad:
                raise RuntimeError(CUT)
            (deltas,) = gradients(losses.sum(), (logits,))
            same = (env.unique().unsqueeze(1) == env).to(logits)  # [E, B]
            return Samples(
                logits.reshape(len(logits), -1),
                deltas.reshape(len(logits), -1),
                None if a is None else a.to(logits.dtype),
                same / same.sum(1, keepdim=True),
            )

    def _require_effect(self, terms: Terms, targets: list[Target]) -> None:
        """Refuse a penalty that trains nothing: one whose loss was cut off the logits."""
        del targets
        if not graphs.leaves(terms.reduced):
            raise RuntimeError(CUT)
        self.seen_to_act = True


USAGE = "use penalty(logits, y, env), or penalty([(logits_1, y_1), (logits_2, y_2), ...])"
CUT = (
    "the penalty depends on no parameter that is trained: were the logits detached, computed under "
    "no_grad, or does `loss=...` not depend on them?"
)


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Return each sample's cross-entropy ``[B]``, the logistic one where it has one logit."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        if y.numel() != len(y):
            raise ValueError(
                f"one logit a sample needs targets [B] in {{0, 1}}; got {list(y.shape)}"
            )
        targets = y.reshape(-1).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits.reshape(-1), targets, reduction="none")
    return F.cross_entropy(logits, y, reduction="none")
