"""Where a call's target, metric and weights come from: constructor arguments of a penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gpkit import checks

NAMES = ("target", "metric", "sample_weight", "groups")

# Where trainers find what a call gives: the key of an entry of the batch, or a function of it.
Key = str | int | Callable[[Any], Any]
Keys = Mapping[str, Key]

Metric = Callable[[Tensor], Tensor]


def as_keys(where: str, given: Keys | None) -> dict[str, Any]:
    """Return the keys of a batch by name.

    Raises:
        ValueError: if a name is not one of `NAMES`.
        TypeError: if a key is neither a string, nor an integer, nor a function.
    """
    for name, key in (given or {}).items():
        checks.choice(where, name, NAMES)
        if not isinstance(key, (str, int)) and not callable(key):
            raise TypeError(
                f"`{where}` must have the key of an entry of the batch, or a function of the "
                f"batch, for {name!r}; got {key!r}"
            )
    return dict(given or {})


def as_metric(where: str, metric: Any) -> Metric | None:
    """Return a function of the variable, or None.

    Raises:
        TypeError: if it is anything else.
    """
    if metric is not None and not callable(metric):
        raise TypeError(
            f"`{where}` must be a function of the variable, x -> A; got a "
            f"{type(metric).__name__}: give a tensor at the call, penalty(f, x, metric=A)"
        )
    return metric
