"""Samples by name: a function of one dict of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gpkit.axes.given.given import Given

Samples = tuple[tuple[Any, ...], Any, Any]  # the arguments after f, real and fake


def by_name(f: Any, samples: Samples, given: Given | None) -> tuple[Any, Samples, Given | None]:
    """Return a call with dicts of samples as one with tuples.

    Args:
        f: a function of a dict, or its output.
        samples: the arguments of the call.
        given: a target or metric may be a dict too.

    Returns:
        The same in the order of the first dict: a function of several inputs.

    Raises:
        ValueError: if the dicts have different keys.
    """
    args, real, fake = samples
    found = [x for x in (*args[:1], real, fake) if isinstance(x, Mapping)]
    keys = tuple(found[0])

    def values(name: str, x: Any) -> Any:
        if not isinstance(x, Mapping):
            return x
        if x.keys() != found[0].keys():
            raise ValueError(
                f"{name} must have the same keys as the samples, {list(keys)}; got {list(x)}"
            )
        return tuple(x[key] for key in keys)

    if given is not None:
        given = replace(
            given, target=values("target=", given.target), metric=values("metric=", given.metric)
        )
    args = (values("the samples", args[0]), *args[1:]) if args else args
    f = partial(called, f, keys) if callable(f) else f
    return f, (args, values("real=", real), values("fake=", fake)), given


def called(f: Callable[[dict[str, Any]], Any], keys: tuple[str, ...], *xs: Any) -> Any:
    """Return f of a dict with these keys."""
    return f(dict(zip(keys, xs, strict=True)))
