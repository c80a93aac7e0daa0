"""EnvironmentPenalty: a penalty on a statistic of the environments in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import gradients
from gpkit.autodiff.isolation import own_forward
from gpkit.autodiff.numerics import wide
from gpkit.autodiff.random import device_of
from gpkit.autodiff.tracing.calls import TRACES, holds, noted
from gpkit.axes.environments import Samples, Statistic
from gpkit.axes.weight import Schedule
from gpkit.estimators.base import Target
from gpkit.formula import REDUCTIONS, Terms, recording, reduced
from gpkit.penalty import Penalty

Losses = Callable[[Tensor, Tensor], Tensor]


class Options(TypedDict, total=False):
    """Keyword arguments of `EnvironmentPenalty` except ``statistic`` and ``weight``."""

    loss: Losses | None
    reduce: str
    every: int
    seed: int | None
    name: str


class EnvironmentPenalty(Penalty):
    r"""A penalty on a statistic of the gradients in each environment of a batch.

    .. math:: \lambda(t) \; \frac1E \sum_e \mathrm{statistic}_e

    Call it as ``penalty(logits, y, env)``, where

    - logits are ``[B, C]`` and y classes ``[B]``, or logits ``[B]`` or ``[B, 1]`` and y in {0, 1};
    - env is ``[B]``, integers: the environment of each sample.

    Or call it as ``penalty([(logits_1, y_1), (logits_2, y_2), ...])``, with one pair for each
    environment. The logits may be a callable that returns them. A statistic of the last linear
    layer needs the pair ``(logits, features)`` in place of the logits; `features` returns it.

    Args:
        statistic: computes one value for each environment.
        loss: ``(logits, y) -> [B]``. None is the cross-entropy, or the binary cross-entropy with
            logits if there is one logit per sample.
        reduce: "mean" over the environments, "sum", or "max".
        weight: λ >= 0, or a schedule: a function of the optimiser step.
        every: act on every k-th step, with the weight multiplied by k (lazy regularisation).
        seed: the seed of a callable's forward pass; None uses torch's initial seed.
        name: the name in logs.

    Raises:
        ValueError: if an argument is out of range.

    >>> import gpkit, torch
    >>> class mean_slope(gpkit.Statistic):  # the squared mean of δ in each environment
    ...     def __call__(self, samples):
    ...         values = (samples.members @ samples.deltas).square().sum(1)
    ...         return values, values
    >>> penalty = EnvironmentPenalty(mean_slope(), loss=lambda f, y: (f - y) ** 2 / 2)
    >>> logits = torch.zeros(4, requires_grad=True)  # δ = -y
    >>> y, env = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    >>> penalty(logits, y, env).item()  # (2² + 5²) / 2
    14.5
    """

    def __init__(
        self,
        statistic: Statistic,
        *,
        loss: Losses | None = None,
        reduce: str = "mean",
        weight: float | Schedule = 1.0,
        every: int = 1,
        seed: int | None = None,
        name: str = "environments",
    ) -> None:
        super().__init__(weight=weight, every=every, seed=seed, name=name)
        self.statistic = statistic
        self.loss = loss or cross_entropies
        self.reduce = checks.choice("reduce=...", reduce, REDUCTIONS)

    def axes(self) -> dict[str, Any]:
        """Return the choices on the axes by name."""
        return {"statistic": self.statistic, "reduce": self.reduce, **super().axes()}

    def evaluate(
        self,
        f: Any,
        args: tuple[Any, ...],
        real: Any,
        fake: Any,
        weight: float,
        seed: int,
        scale: Tensor | float | None = None,
        *,
        acts: bool = False,
    ) -> Terms:
        """Return the terms for a weight.

        Args:
            f: the logits, a callable that returns them, or a list of pairs of logits and targets.
            args: y and env, or empty for pairs.
            real: must be None.
            fake: must be None.
            weight: the factor of the reduced value.
            seed: the seed of a callable's forward pass.
            scale: ignored: δ = ∂ℓ/∂logits, in float32 or better, does not underflow.
            acts: whether the terms are trained on.

        Returns:
            The terms; G = E, the number of environments.

        Raises:
            RuntimeError: if the logits have no graph.
            TypeError: if an argument has the wrong type.
        """
        train = torch.is_grad_enabled()
        if real is not None or fake is not None:
            raise TypeError(f"{self.name} takes no real= or fake=: {USAGE}")
        with recording(train):
            with own_forward(f, seed, device_of(f, args)):
                output, y, env = self._read(f, args)
            logits, a = self._split(output)
            if train and not logits.requires_grad:
                raise RuntimeError(CUT)
            samples = self._samples(logits, a, y, env, trains=acts and train)
            n2, values = self.statistic(samples)
            terms = Terms(n2, values, weight, reduced(values, self.reduce), (logits,))
        target = Target(logits, (), True)
        if acts and train and not TRACES and target not in self.seen:
            if not graph.leaves(terms.reduced):
                raise RuntimeError(CUT)
            self.seen.add(target)
        return terms if train else terms.detached()

    def _read(self, f: Any, args: tuple[Any, ...]) -> tuple[Any, Tensor, Tensor]:
        """Return the outputs, targets and environments of a call, in either calling form."""
        if len(args) == 2:
            y, env = args
            f = f() if callable(f) else f
        elif not args and isinstance(f, (list, tuple)) and all(len(pair) == 2 for pair in f):
            outputs = [output() if callable(output) else output for output, _ in f]
            y = torch.cat([y for _, y in f])
            env = torch.cat(
                [torch.full((len(y),), e, device=y.device) for e, (_, y) in enumerate(f)]
            )
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
        """Return logits ``[B, C]`` or ``[B]``, and features ``[B, d]`` if they are needed."""
        if not self.statistic.features:
            output = (output, None)
        if not isinstance(output, (list, tuple)) or len(output) != 2:
            raise TypeError(
                f"{self.name} takes (logits, features), which gpkit.features(net, x) returns; got "
                f"a {type(output).__name__}"
            )
        logits, a = output
        if not isinstance(logits, Tensor) or logits.ndim not in (1, 2):
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"logits must be a tensor [B, C] or [B]; got {found}")
        if a is not None and (not isinstance(a, Tensor) or a.ndim != 2 or len(a) != len(logits)):
            found = list(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise TypeError(f"features must be a tensor [{len(logits)}, d]; got {found}")
        return logits, a

    def _samples(
        self, logits: Tensor, a: Tensor | None, y: Tensor, env: Tensor, *, trains: bool
    ) -> Samples:
        logits = logits.to(wide(logits))
        if not len(logits) == len(y) == len(env):
            raise ValueError(
                "logits, y and env must have one entry for every sample; got "
                f"{len(logits)}, {len(y)} and {len(env)}"
            )
        if not logits.requires_grad:
            logits = logits.detach().clone().requires_grad_()  # under no_grad, only δ needs a graph
        with torch.autocast(logits.device.type, enabled=False):
            losses = self.loss(logits, y)
            if losses.shape != logits.shape[:1]:
                raise ValueError(
                    f"`loss=...` must return one loss per sample, [{len(logits)}]; got "
                    f'{list(losses.shape)}: use reduction="none"'
                )
            if not losses.requires_grad:
                raise RuntimeError(CUT)
            (deltas,) = gradients(losses.sum(), (logits,))
            names: tuple[int, ...] = noted(lambda: tuple(env.unique().tolist()))
            same = torch.tensor(names, device=env.device).unsqueeze(1) == env  # [E, B]
            holds(lambda: same.any(0).all() & same.any(1).all())  # the same environments
            same = same.to(logits)
            return Samples(
                logits.reshape(len(logits), -1),
                deltas.reshape(len(logits), -1),
                None if a is None else a.to(logits.dtype),
                same / same.sum(1, keepdim=True),
                names,
                trains,
            )


USAGE = "use penalty(logits, y, env), or penalty([(logits_1, y_1), (logits_2, y_2), ...])"


CUT = (
    "the penalty does not depend on any trained parameter: were the logits detached, computed "
    "under no_grad, or does `loss=...` not depend on them?"
)


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy ``[B]`` of each sample, the binary one if it has one logit."""
    if logits.ndim == 1 or logits.shape[1] == 1:
        if y.numel() != len(y):
            raise ValueError(
                f"one logit per sample needs targets [B] in {{0, 1}}; got {list(y.shape)}"
            )
        targets = y.reshape(-1).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits.reshape(-1), targets, reduction="none")
    return F.cross_entropy(logits, y, reduction="none")
