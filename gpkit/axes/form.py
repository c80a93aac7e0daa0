"""The axis `form`: what is done to the norm n."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.numerics import root


@dataclass
class running_average:
    """An exponential average of the mean norm over the calls of a penalty: a ← d·a + (1 - d)·mean.

    The mean is that of this call's norms, detached, and over all ranks of a distributed run, each
    of which must then make the same calls. The average that has it is the centre of the call:
    `GradientPenalty.terms`, which counts no step, leaves the average as it is and takes that. A
    mean that is not finite, such as that of a step that a gradient scaler skips, does not enter.
    It is part of the penalty's state; two penalties should not share one.

    Args:
        decay: d in [0, 1].
        value: a, where it begins.

    Raises:
        ValueError: if ``decay`` is not in [0, 1].

    >>> center = running_average(0.9)
    >>> center.update(torch.tensor([1.0, 3.0]))
    >>> round(center.value, 6)
    0.2
    """

    decay: float = 0.99
    value: float = 0.0

    def __post_init__(self) -> None:
        checks.number("running_average(decay=...)", self.decay, 0)
        checks.number("running_average(value=...)", self.value)
        if self.decay > 1:
            raise ValueError(
                f"`running_average(decay=...)` must be a number in [0, 1]; got {self.decay!r}"
            )

    def update(self, norms: Tensor) -> None:
        """Let the mean of norms ``[G]`` enter."""
        total = torch.stack([norms.detach().sum(), norms.new_tensor(len(norms))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        summed, count = total.tolist()
        if math.isfinite(summed):
            self.value = self.decay * self.value + (1 - self.decay) * (summed / count)

    def state_dict(self) -> dict[str, float]:
        """Return the average, a plain number."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from an average."""
        self.value = state["value"]


NORMS = ("l2", "l1", "linf")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is done to the norm: ``scale * value(n²)``.

    Args:
        norm: which norm n is, over all entries of the derivative: "l2", "l1" or "linf".
        scale: a factor inside the form, such as the ½ of a γ/2.
    """

    norm: str = "l2"
    scale: float = 1.0

    def __post_init__(self) -> None:
        checks.choice(f"{type(self).__name__}(norm=...)", self.norm, NORMS)
        checks.number(f"{type(self).__name__}(scale=...)", self.scale, 0, strict=True)

    def __call__(self, squared_norms: Tensor) -> Tensor:
        """Return ``[G]`` values for ``[G]`` squared norms."""
        values = self.value(squared_norms)
        return values if self.scale == 1 else values * self.scale

    def observe(self, squared_norms: Tensor) -> None:
        """Take in n² ``[G]`` of a call before it is valued, where the form has a state."""

    def value(self, squared_norms: Tensor) -> Tensor:
        """Return the value before ``scale``: ``[G]`` to ``[G]``."""
        raise NotImplementedError(f"{type(self).__name__} must define value(squared_norms)")


@dataclass(frozen=True, kw_only=True)
class squared(Form):
    """n². No root is taken, so a zero gradient is harmless.

    >>> squared(scale=0.5)(torch.tensor([4.0, 9.0]))
    tensor([2.0000, 4.5000])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        return squared_norms


@dataclass(frozen=True, kw_only=True)
class norm(Form):
    """n itself.

    >>> norm()(torch.tensor([4.0, 9.0]))
    tensor([2., 3.])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        return root(squared_norms)


@dataclass(frozen=True)
class two_sided(Form):
    """(n - c)²: the norm is drawn to the centre c from both sides.

    c is a number, or a ``gpkit.running_average()`` of the norms.

    >>> two_sided(1.0)(torch.tensor([0.0, 4.0, 9.0]))
    tensor([1., 1., 4.])
    """

    center: float | running_average = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.center, running_average):
            checks.number(f"{type(self).__name__}(center=...)", self.center)

    @property
    def c(self) -> float:
        """The centre as it is now."""
        return self.center.value if isinstance(self.center, running_average) else self.center

    def value(self, squared_norms: Tensor) -> Tensor:
        if self.c == 0:
            return squared_norms
        return (root(squared_norms) - self.c).square()

    def observe(self, squared_norms: Tensor) -> None:
        if isinstance(self.center, running_average):
            self.center.update(squared_norms.detach().sqrt())

    def state_dict(self) -> dict[str, float]:
        """Return the state of a running average; a number has none."""
        return self.center.state_dict() if isinstance(self.center, running_average) else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a state."""
        if isinstance(self.center, running_average):
            self.center.load_state_dict(state)


@dataclass(frozen=True)
class one_sided(two_sided):
    """max(0, n - c)²: only norms above the centre c count.

    >>> one_sided(1.0)(torch.tensor([0.0, 4.0, 9.0]))
    tensor([0., 1., 4.])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        if self.c == 0:
            return squared_norms
        return (root(squared_norms) - self.c).relu().square()


@dataclass(frozen=True)
class power(Form):
    """n^p. For p >= 2 no root is taken.

    >>> power(6)(torch.tensor([0.0, 4.0]))
    tensor([ 0., 64.])
    """

    exponent: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("power(exponent=...)", self.exponent, 0, strict=True)

    def value(self, squared_norms: Tensor) -> Tensor:
        if self.exponent >= 2:
            return squared_norms ** (self.exponent / 2)
        positive = squared_norms > 0
        safe = torch.where(positive, squared_norms, torch.ones_like(squared_norms))
        return torch.where(positive, safe ** (self.exponent / 2), squared_norms * 0)


FORMS = {f.__name__: f for f in (squared, norm, two_sided, one_sided, power)}
