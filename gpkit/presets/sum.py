"""Several penalties as one: penalties, names of presets, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gpkit import checks
from gpkit.penalty import Penalty
from gpkit.presets import PRESETS
from gpkit.sums import PenaltySum, as_sum, uncalled

Part = Penalty | PenaltySum | Mapping[str, Any] | None
Parts = Mapping[str, Part] | Iterable[str | Penalty | PenaltySum]


def sum(parts: Parts) -> PenaltySum:
    """Combine several penalties into one.

    Args:
        parts: a dict or a list. The values of a dict are penalties, or arguments of presets:
            ``{"r1": {"weight": 1}}``, or with a name of your own ``{"mine": {"preset": "r1"}}``.
            The elements of a list are penalties, which keep their names, or names of presets. A sum
            among the parts is replaced by its own parts.

    Returns:
        The sum. Call it as you call each part.

    Raises:
        ValueError: if there is no preset of a name, if two parts have the same name, or if there
            are no parts.
        TypeError: if a part is neither a penalty nor the arguments of a preset.

    >>> import torch
    >>> both = sum({"r1": {"weight": 1.0}, "r2": {"weight": 1.0}})
    >>> x = torch.full((4, 1), 2.0)
    >>> both(lambda x: (x**2).sum(1) / 2, real=x, fake=x).item()  # 2²/2 + 2²/2
    4.0
    """
    parts = [parts] if isinstance(parts, str) else parts
    if isinstance(parts, Mapping):
        made = as_sum({name: _build(name, part) for name, part in parts.items()})
    else:
        made = as_sum([_build(p, None) if isinstance(p, str) else _build("", p) for p in parts])
    if not made:
        raise ValueError("`sum(parts=...)` needs at least one penalty; got none")
    return made


def _build(name: str, part: Part) -> Any:
    if isinstance(part, (Penalty, PenaltySum)):
        return part
    if part is not None and not isinstance(part, Mapping):
        raise TypeError(
            f"`sum(parts=...)` takes penalties, or dicts of their arguments; got {uncalled(part)}"
            + (f" for {name!r}" if name else "")
        )
    arguments = dict(part or {})
    preset = arguments.pop("preset", name)
    return PRESETS[checks.choice("sum(parts=...)", preset, PRESETS)](**arguments)
