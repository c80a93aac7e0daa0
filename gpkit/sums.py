"""Several penalties as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union

from torch import Tensor

from gpkit import checks
from gpkit.penalty import GradientPenalty, Terms
from gpkit.presets import PRESETS

Penalties = Union[
    GradientPenalty, "PenaltySum", Mapping[str, GradientPenalty], Iterable[GradientPenalty]
]
Parts = Mapping[str, "GradientPenalty | Mapping[str, Any] | None"] | Iterable[str]


class PenaltySum:
    """The sum of several penalties, each with its own name, weight and state.

    Called with what each of its parts takes, it returns the sum of them. A LightningModule logs
    the parts one by one.

    Args:
        parts: penalties by name.
    """

    def __init__(self, parts: Mapping[str, GradientPenalty]) -> None:
        self.parts = dict(parts)

    def __call__(self, f: Any, *args: Any, **samples: Any) -> Tensor:
        """Return the sum of the penalties. Raises what they raise.

        Args:
            f: as in `GradientPenalty`.
            *args: as there.
            **samples: as there.

        Returns:
            A scalar to add to the loss.
        """
        args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)  # for each part
        first, *others = [part(f, *args, **samples) for part in self.parts.values()]
        for other in others:
            first = first + other
        return first

    def terms(self, f: Any, *args: Any, **samples: Any) -> dict[str, Terms]:
        """Return the terms of each part, by name."""
        return {name: part.terms(f, *args, **samples) for name, part in self.parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def __repr__(self) -> str:
        return f"PenaltySum({self.parts!r})"


def sum(parts: Parts) -> PenaltySum:
    """Combine penalties by name.

    Args:
        parts: penalties by name; or presets by name with their arguments (``{"r1": {"weight": 1}}``
            or, under a name of your own, ``{"mine": {"preset": "r1"}}``); or names of presets.

    Returns:
        Their sum, called as each of them is.

    Raises:
        ValueError: if a name is no preset's, or there are no parts.
        TypeError: if a part is neither a penalty nor the arguments of one.

    >>> import torch
    >>> both = sum({"r1": {"weight": 1.0}, "r2": {"weight": 1.0}})
    >>> x = torch.full((4, 1), 2.0)
    >>> both(lambda x: (x**2).sum(1) / 2, real=x, fake=x).item()  # 2²/2 + 2²/2
    4.0
    """
    if isinstance(parts, str):
        parts = [parts]
    if not isinstance(parts, Mapping):
        parts = dict.fromkeys(parts)
    if not parts:
        raise ValueError("`sum(parts=...)` needs at least one penalty; got none")
    return PenaltySum({name: _build(name, part) for name, part in parts.items()})


def _build(name: str, part: Any) -> GradientPenalty:
    if isinstance(part, GradientPenalty):
        return part
    if part is not None and not isinstance(part, Mapping):
        raise TypeError(
            f"`sum(parts=...)` takes penalties, or mappings of their arguments; got {part!r} for "
            f"{name!r}"
        )
    arguments = dict(part or {})
    preset = arguments.pop("preset", name)
    return PRESETS[checks.choice("sum(parts=...)", preset, PRESETS)](**arguments)


def penalties_by_name(penalty: Penalties | None) -> dict[str, GradientPenalty]:
    """Return penalties by name.

    Args:
        penalty: one, which goes by its own name; a list of them; several by name; a sum; or None.

    Returns:
        The penalties.

    Raises:
        TypeError: if there is anything else.
        ValueError: if two in a list have the same name.
    """
    if penalty is None:
        return {}
    if isinstance(penalty, GradientPenalty):
        return {penalty.name: penalty}
    parts: Any = penalty.parts if isinstance(penalty, PenaltySum) else penalty
    if isinstance(parts, (list, tuple)) and all(isinstance(p, GradientPenalty) for p in parts):
        named = {part.name: part for part in parts}
        if len(named) < len(parts):
            raise ValueError(
                "`penalty=[...]` has two penalties of one name; name them in a dict, {'a': ...}, "
                f"or with name=...; got {', '.join(part.name for part in parts)}"
            )
        return named
    if not isinstance(parts, Mapping):
        raise TypeError(
            f"`penalty=...` must be a penalty, or a list or dict of them; got {penalty!r}"
        )
    for name, part in parts.items():
        if not isinstance(part, GradientPenalty):
            raise TypeError(f"`penalty={{{name!r}: ...}}` must be a penalty; got {part!r}")
    return dict(parts)
