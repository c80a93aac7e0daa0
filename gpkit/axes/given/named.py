"""Samples by name: a function of one dict of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.compat import tree_map_only
from gpkit.axes.given.given import Given

Samples = tuple[tuple[Any, ...], Any, Any]  # the arguments after f, real and fake


def by_name(
    f: Any, samples: Samples, given: Given | None, axes: Any
) -> tuple[Any, Samples, Given | None]:
    """Return a call with dicts of samples as one with tuples; one without dicts as it is.

    Args:
        f: a function of a dict, or its output.
        samples: the arguments of the call.
        given: a target or metric may be a dict too.
        axes: of the penalty. ``wrt.keys`` are the entries that are variables; () for all. The
            others are constants: those of the points, if ``at.samples`` says that these are the
            samples themselves, and else the same for real and fake samples.

    Returns:
        The same in the order of the keys, or of the first dict: a function of several inputs.

    Raises:
        TypeError: if there are keys, and no dict.
        ValueError: if the dicts have different keys, lack one, or have different constants.
    """
    (args, real, fake), keys = samples, axes.wrt.keys
    found = [x for x in (*args[:1], real, fake) if isinstance(x, Mapping)]
    if not found:
        if keys:
            kind = type(next(iter((*args[:1], real, fake)), None)).__name__
            raise TypeError(
                f"`wrt=gpkit.inputs(...)` names the entries {list(keys)} of a dict of samples; got "
                f"a {kind}: penalty(f, {{{keys[0]!r}: x, ...}})"
            )
        return f, samples, given
    first, keys = found[0], keys or tuple(found[0])
    missing = [key for key in keys if key not in first]
    if missing:
        raise ValueError(
            f"`wrt=gpkit.inputs(...)` names {missing[0]!r}, and the samples have "
            f"{list(first)}{checks.nearest(missing[0], map(str, first))}"
        )
    constants = {key: value for key, value in first.items() if key not in keys}
    kinds = {"real": real, "fake": fake}
    points = [kinds[kind] for kind in axes.at.samples]
    used = [*args[:1], *[kinds[kind] for kind in axes.at.reads]]
    for other in [x for x in used if isinstance(x, Mapping) and x is not first]:
        for key in [k for k, v in constants.items() if k in other and not same(other[k], v)]:
            parts = [x[key] for x in points if isinstance(x, Mapping) and key in x]
            if not parts or len(parts) < len(points) or not all(map(has_rows, parts)):
                raise ValueError(
                    f"real= and fake= must have the same {key!r}, which "
                    f"`wrt=gpkit.inputs(...)` takes as a constant; got different ones"
                )
            constants[key] = torch.cat(parts)

    def values(name: str, x: Any) -> Any:
        if not isinstance(x, Mapping):
            return x
        if x.keys() != first.keys() and (any(x is y for y in found) or x.keys() != set(keys)):
            raise ValueError(
                f"{name} must have the same keys as the samples, {list(first)}; got {list(x)}"
            )
        return tuple(x[key] for key in keys)

    if given is not None:
        given = replace(
            given, target=values("target=", given.target), metric=values("metric=", given.metric)
        )
    args = (values("the samples", args[0]), *args[1:]) if args else args
    f = partial(called, f, keys, constants) if callable(f) else f
    return f, (args, values("real=", real), values("fake=", fake)), given


def called(
    f: Callable[[dict[str, Any]], Any], keys: tuple[str, ...], constants: dict[str, Any], *xs: Any
) -> Any:
    """Return f of a dict with these keys and constants, repeated for several points a sample."""
    points = len(xs[0])

    def repeat(value: Tensor) -> Tensor:
        if not value.ndim or len(value) == points or not len(value) or points % len(value):
            return value
        return torch.cat([value] * (points // len(value)))

    others = tree_map_only(Tensor, repeat, constants) if constants else {}
    return f({**others, **dict(zip(keys, xs, strict=True))})


def has_rows(value: Any) -> bool:
    """Whether an entry is a tensor with a row for each sample."""
    return isinstance(value, Tensor) and value.ndim > 0


def same(a: Any, b: Any) -> bool:
    """Whether two entries are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool((a == b).all()))
    return bool(a is b or a == b)
