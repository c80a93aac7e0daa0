"""The axis `form`: the function of the norm n."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gpkit import checks
from gpkit.autodiff.numerics import root
from gpkit.autodiff.tracing.calls import afterwards
from gpkit.axes.average import running_average

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
    >>> quartic(scale=0.5)(Tensor([4.0]))  # n = 2
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

    def for_call(self, squared_norms: Tensor) -> Form:
        """Return the form of a call that trains, with n² ``[G]``: it may depend on all of them."""
        return self

    def observe(self, squared_norms: Tensor) -> None:
        """Update the state of the form with n² ``[G]`` of a call that trains."""

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

    >>> squared(scale=0.5)(Tensor([4.0, 9.0]))
    tensor([2.0000, 4.5000])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        return squared_norms


@dataclass(frozen=True, kw_only=True)
class Rooted(Form):
    """A form that takes the root of n². The base class of `norm`, `two_sided` and their like.

    Args:
        eps: ε >= 0, inside of the root: n is √(n² + ε). With 0 the gradient at n = 0 is defined as
            zero, so ε is only for parity with published code: 1e-12 and 1e-10 are common there.

    Raises:
        ValueError: if ``eps`` is negative.

    >>> two_sided(1.0, eps=0.25)(Tensor([0.0]))  # (½ - 1)²
    tensor([0.2500])
    """

    eps: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number(f"{type(self).__name__}(eps=...)", self.eps, 0)

    def shifted(self, squared_norms: Tensor) -> Tensor:
        """Return n² + ε."""
        return squared_norms + self.eps if self.eps else squared_norms

    def root(self, squared_norms: Tensor) -> Tensor:
        """Return √(n² + ε)."""
        return root(self.shifted(squared_norms))


@dataclass(frozen=True, kw_only=True)
class norm(Rooted):
    """n. Its gradient at n = 0 is defined as zero.

    Args:
        eps: ε inside of the root, √(n² + ε).
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> norm()(Tensor([4.0, 9.0]))
    tensor([2., 3.])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        return self.root(squared_norms)


@dataclass(frozen=True)
class two_sided(Rooted):
    """(n - c)²: pulls the norm to the centre c from both sides.

    Args:
        center: c: a number; a tensor, ``[]`` or one number for each norm ``[G]``, which may have a
            graph; or a ``gpkit.running_average()`` of the norms.
        eps: ε inside of the root, √(n² + ε).
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> two_sided(1.0)(Tensor([0.0, 4.0, 9.0]))
    tensor([1., 1., 4.])
    """

    center: float | Tensor | running_average = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.center, Tensor):
            if self.center.ndim > 1:
                raise ValueError(
                    f"`{type(self).__name__}(center=...)`, a tensor, must be [] or [G], one number "
                    f"for each norm; got {list(self.center.shape)}"
                )
        elif not isinstance(self.center, running_average):
            checks.number(f"{type(self).__name__}(center=...)", self.center)

    @property
    def c(self) -> float | Tensor:
        """The current centre."""
        return self.center.value if isinstance(self.center, running_average) else self.center

    def above(self, n: Tensor) -> Tensor:
        """Return n - c, ``[G]``."""
        c = self.c
        if isinstance(c, Tensor) and c.ndim and c.shape != n.shape:
            raise ValueError(
                f"`{type(self).__name__}(center=...)` has {len(c)} numbers, for {len(n)} norms: "
                "give one for each norm, or a single number"
            )
        return n - (c.to(n) if isinstance(c, Tensor) else c)

    def value(self, squared_norms: Tensor) -> Tensor:
        if not isinstance(self.c, Tensor) and self.c == 0:
            return self.shifted(squared_norms)
        return self.of_root(self.root(squared_norms))

    def of_root(self, n: Tensor) -> Tensor:
        """Return the values ``[G]`` for n ``[G]``, without ``scale``."""
        return self.above(n).square()

    def for_call(self, squared_norms: Tensor) -> Form:
        if not isinstance(self.center, running_average):
            return self
        return replace(self, center=self.center.for_call(self.root(squared_norms)))

    def observe(self, squared_norms: Tensor) -> None:
        if isinstance(self.center, running_average):
            update = self.center.update
            afterwards(lambda n2: update(self.root(n2)), squared_norms)

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
        center: c, as in `two_sided`.
        eps: ε inside of the root, √(n² + ε).
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> one_sided(1.0)(Tensor([0.0, 4.0, 9.0]))
    tensor([0., 1., 4.])
    """

    def of_root(self, n: Tensor) -> Tensor:
        return self.above(n).relu().square()


@dataclass(frozen=True)
class absolute(two_sided):
    """|n - c|: pulls the norm to the centre c with the same force from everywhere.

    Its gradient at n = c, and at n = 0, is defined as zero.

    Args:
        center: c, as in `two_sided`.
        eps: ε inside of the root, √(n² + ε).
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> absolute(1.0)(Tensor([0.0, 4.0, 9.0]))
    tensor([1., 1., 2.])
    """

    def value(self, squared_norms: Tensor) -> Tensor:
        return self.above(self.root(squared_norms)).abs()


@dataclass(frozen=True)
class power(Rooted):
    """n^p. Its gradient is finite at n = 0 for every p.

    Args:
        exponent: p > 0.
        eps: ε inside of the root, √(n² + ε)^p.
        norm: "l2", "l1" or "linf".
        scale: a constant factor, > 0.

    Raises:
        ValueError: if an argument is out of range.

    >>> power(6)(Tensor([0.0, 4.0]))
    tensor([ 0., 64.])
    """

    exponent: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("power(exponent=...)", self.exponent, 0, strict=True)

    def value(self, squared_norms: Tensor) -> Tensor:
        squared_norms = self.shifted(squared_norms)
        if self.exponent >= 2:
            return squared_norms ** (self.exponent / 2)
        zero = squared_norms <= 0  # not "not > 0", which would hide a NaN
        safe = squared_norms.masked_fill(zero, 1.0)
        return (safe ** (self.exponent / 2)).masked_fill(zero, 0.0)


@dataclass(frozen=True)
class of_norm(Rooted):
    """A function of the norm n, such as ``form=lambda n: (n - 1).abs()``.

    The gradient of n at n = 0 is defined as zero.

    Args:
        function: n ``[G]`` to values ``[G]``, differentiable.
        eps: ε inside of the root, √(n² + ε).

    Raises:
        ValueError: in the call, if the values have another shape.

    >>> of_norm(lambda n: (n - 1).abs())(Tensor([0.0, 4.0]))
    tensor([1., 1.])
    """

    function: Callable[[Tensor], Tensor] = lambda n: n

    def value(self, squared_norms: Tensor) -> Tensor:
        values = self.function(self.root(squared_norms))
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
    checks.an_object(where, form)
    if callable(form) and not isinstance(form, Form):
        return of_norm(form)
    given: Form = checks.piece(where, form, FORMS, Form)
    return given


FORMS = {f.__name__: f for f in (squared, norm, two_sided, one_sided, absolute, power)}
