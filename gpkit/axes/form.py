"""The axis `form`: the function of the norm n."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.numerics import root


@dataclass
class running_average:
    """An exponential moving average of the mean norm: a ← d·a + (1 - d)·mean, once per call.

    The mean is over this call's norms, detached, on all ranks of a distributed run; so each rank
    must make the same calls. The average is updated first, and then used as the centre of the
    same call. `GradientPenalty.terms` uses the average without an update. A mean that is not
    finite, such as on a step that a gradient scaler skips, is ignored. The average is part of the
    penalty's state; do not share one object between penalties.

    Args:
        decay: d in [0, 1].
        value: the initial a.

    Raises:
        ValueError: if ``decay`` is not in [0, 1], or ``value`` is not a finite number.

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
        """Update the average with the mean of norms ``[G]``."""
        total = torch.stack([norms.detach().sum(), norms.new_tensor(len(norms))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        summed, count = total.tolist()
        if math.isfinite(summed):
            self.value = self.decay * self.value + (1 - self.decay) * (summed / count)

    def state_dict(self) -> dict[str, float]:
        """Return the average as a plain number."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the average."""
        self.value = state["value"]


NORMS = ("l2", "l1", "linf")


@dataclass(frozen=True, kw_only=True)
class Form:
    """A function of the norm n, computed from n²: ``scale * value(n²)``. The base class of `form`.

    A subclass defines one method, ``value``.

    Args:
        norm: "l2", "l1" or "linf": the norm n, over all entries of the derivative.
        scale: a constant factor, such as the ½ in γ/2.

    Raises:
        ValueError: if ``norm`` is another name, or ``scale`` is not > 0.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class quartic(Form):
    ...     def value(self, squared_norms):
    ...         return squared_norms**2
    >>> quartic(scale=0.5)(torch.tensor([4.0]))  # n = 2
    tensor([8.])
    """

    norm: str = "l2"
    scale: float = 1.0

    def __post_init__(self) -> None:
        checks.choice(f"{type(self).__name__}(norm=...)", self.norm, NORMS)
        checks.number(f"{type(self).__name__}(scale=...)", self.scale, 0, strict=True)

    def __call__(self, squared_norms: Tensor) -> Tensor:
        """Return ``scale * value(n²)`` ``[G]`` for n² ``[G]``."""
        values = self.value(squared_norms)
        return values if self.scale == 1 else values * self.scale

    def observe(self, squared_norms: Tensor) -> None:
        """Update the state of the form with n² ``[G]`` of a call, before ``value``."""

    def value(self, squared_norms: Tensor) -> Tensor:
        """Return the values ``[G]`` for n² ``[G]``, without ``scale``."""
        raise NotImplementedError(f"{type(self).__name__} must define value(squared_norms)")


@dataclass(frozen=True, kw_only=True)
class squared(Form):
    """n². It takes no root, so its gradient is finite at n = 0.

    Args:
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> squared(scale=0.5)(torch.tensor([4.0, 9.0]))
    tensor([2.0000, 4.5000])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        return squared_norms


@dataclass(frozen=True, kw_only=True)
class norm(Form):
    """n. Its gradient at n = 0 is defined as zero.

    Args:
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> norm()(torch.tensor([4.0, 9.0]))
    tensor([2., 3.])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        return root(squared_norms)


@dataclass(frozen=True)
class two_sided(Form):
    """(n - c)²: pulls the norm to the centre c from both sides.

    Args:
        center: c, a number, or a ``gpkit.running_average()`` of the norms.
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

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
        """The current centre."""
        return self.center.value if isinstance(self.center, running_average) else self.center

    def value(self, squared_norms: Tensor) -> Tensor:
        if self.c == 0:
            return squared_norms
        return (root(squared_norms) - self.c).square()

    def observe(self, squared_norms: Tensor) -> None:
        if isinstance(self.center, running_average):
            self.center.update(squared_norms.detach().sqrt())

    def state_dict(self) -> dict[str, float]:
        """Return the state of a running average, or {} if the centre is a number."""
        return self.center.state_dict() if isinstance(self.center, running_average) else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of a running average."""
        if isinstance(self.center, running_average):
            self.center.load_state_dict(state)


@dataclass(frozen=True)
class one_sided(two_sided):
    """max(0, n - c)²: penalises only norms above the centre c.

    Args:
        center: c, a number, or a ``gpkit.running_average()`` of the norms.
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> one_sided(1.0)(torch.tensor([0.0, 4.0, 9.0]))
    tensor([0., 1., 4.])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        if self.c == 0:
            return squared_norms
        return (root(squared_norms) - self.c).relu().square()


@dataclass(frozen=True)
class power(Form):
    """n^p. Its gradient is finite at n = 0 for every p.

    Args:
        exponent: p > 0.
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

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


@dataclass(frozen=True)
class of_norm(Form):
    """A function of the norm n, such as ``form=lambda n: (n - 1).abs()``.

    The gradient of n at n = 0 is defined as zero.

    Args:
        function: n ``[G]`` to values ``[G]``, differentiable.

    Raises:
        ValueError: in the call, if the values have another shape.

    >>> of_norm(lambda n: (n - 1).abs())(torch.tensor([0.0, 4.0]))
    tensor([1., 1.])
    """

    function: Callable[[Tensor], Tensor] = lambda n: n

    def value(self, squared_norms: Tensor) -> Tensor:
        values = self.function(root(squared_norms))
        if not isinstance(values, Tensor) or values.shape != squared_norms.shape:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"`form=...`, a function of the norms n {list(squared_norms.shape)}, must return a "
                f"value for each; got {got}: use reduce='mean' for the mean"
            )
        return values


def as_form(where: str, form: Any) -> Form:
    """Return a `Form` for an object, a name in `FORMS`, or a function of the norm n.

    Raises:
        ValueError: if the name is not in `FORMS`.
        TypeError: if it is anything else, or a class instead of an object.
    """
    if isinstance(form, type):
        raise TypeError(f"`{where}` must be a form, not the class: {form.__name__}()")
    if callable(form) and not isinstance(form, Form):
        return of_norm(form)
    given: Form = checks.piece(where, form, FORMS, Form)
    return given


FORMS = {f.__name__: f for f in (squared, norm, two_sided, one_sided, power)}
