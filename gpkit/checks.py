"""Argument checks with uniform messages: what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(word: str, options: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the option closest to ``word``, or an empty string.

    >>> nearest("projektion", ["exact", "projection"])
    " (did you mean 'projection'?)"
    """
    close = difflib.get_close_matches(str(word), list(options), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choice(where: str, value: Any, options: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``options``.

    Raises:
        ValueError: if it is not; the message lists the options and suggests the closest one.
    """
    options = list(options)
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(
            f"`{where}` must be one of {listed}; got {value!r}{nearest(value, options)}"
        )
    return str(value)


def number(where: str, value: Any, low: float = -math.inf, *, strict: bool = False) -> float:
    """Return ``value`` as a float if it is a finite number >= ``low`` (> ``low`` if ``strict``).

    Raises:
        ValueError: if it is not.
    """
    bound = "" if low == -math.inf else f" {'>' if strict else '>='} {low:g}"
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value < low or (strict and value == low):
        raise ValueError(f"`{where}` must be a number{bound}; got {value!r}")
    return float(value)


def integer(where: str, value: Any, low: int) -> int:
    """Return ``value`` if it is an integer >= ``low``.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"`{where}` must be an integer >= {low}; got {value!r}")
    return value


def piece(where: str, value: Any, kinds: Mapping[str, Callable[[], Any]], kind: Any) -> Any:
    """Return ``value`` if it is a ``kind``, or call ``kinds[value]`` if it is a string.

    Raises:
        ValueError: if the string is not a key of ``kinds``.
        TypeError: if ``value`` is anything else.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        return kinds[choice(where, value, kinds)]()
    an_object(where, value)
    listed = ", ".join(repr(name) for name in kinds)
    raise TypeError(f"`{where}` must be one of {listed} or a gpkit object; got {value!r}")


def an_object(where: str, value: Any) -> None:
    """Refuse a class, which is callable and would be taken for a function.

    Raises:
        TypeError: if ``value`` is a class.
    """
    if isinstance(value, type):
        raise TypeError(
            f"`{where}` must be an object; got the class {value.__name__}: add parentheses, "
            f"{value.__name__}(...)"
        )


def keywords(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keyword arguments that a function does not have, with the name that is meant.

    >>> keywords("r1", ["lambda_gp"], ["weight"])
    Traceback (most recent call last):
    TypeError: `r1(...)` has no argument 'lambda_gp' (did you mean 'weight'?); it takes weight

    Raises:
        TypeError: if there is one.
    """
    known = list(known)
    for key in given:
        if key in ("real", "fake", "critic", "f", "x"):
            raise TypeError(
                f"`{name}(...)` makes a penalty and takes no {key}=; call the penalty with it: "
                f"penalty = {name}(); penalty(critic, real=real, fake=fake)"
            )
        if key not in known:
            meant = next((ours for ours, theirs in MEANT.items() if key.lower() in theirs), None)
            hint = f" (did you mean {meant!r}?)" if meant else nearest(key, known)
            raise TypeError(
                f"`{name}(...)` has no argument {key!r}{hint}; it takes {', '.join(known)}"
            )


# What other projects call an argument.
MEANT = {
    "weight": (
        "lambda_gp", "gp_lambda", "lambda_", "lam", "lamb", "lmbda", "lambd", "lambda", "gp_weight",
        "gradient_penalty_weight", "penalty_weight", "gamma", "r1_gamma", "coef", "coeff",
        "coefficient", "alpha", "beta", "strength", "gp_coef",
    ),
    "every": ("lazy", "interval", "lazy_every", "d_reg_every", "g_reg_interval", "reg_interval"),
    "form": ("center", "target", "one_sided", "two_sided"),
    "estimator": ("method", "approximation", "num_projections", "n_proj"),
}  # fmt: skip


def optional_integer(where: str, value: Any, low: int) -> int | None:
    """Return ``value`` if it is None, or an integer >= ``low``."""
    return None if value is None else integer(where, value, low)


def is_a(thing: Any, *names: str) -> bool:
    """Whether ``thing`` is an instance of a class with one of these names, from either package."""
    # isinstance would need the classes of both, and import both.
    return any(c.__name__ in names for c in type(thing).__mro__)
