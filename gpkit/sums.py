"""Several penalties as one: each keeps its own name, weight and state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from gpkit.formula import Terms
from gpkit.gradient_penalty import with_loss
from gpkit.penalty import Penalty

Penalties = Penalty | Mapping[str, Penalty] | Iterable[Penalty]


class PenaltySum(Mapping[str, Penalty]):
    """Penalties by name, and their sum. It is called as each of them is.

    A LightningModule logs the parts one by one.

    Args:
        parts: penalties by name.
    """

    def __init__(self, parts: Mapping[str, Penalty]) -> None:
        self.parts = dict(parts)

    def __getitem__(self, name: str) -> Penalty:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def name(self) -> str:
        """What the sum is called: the names of its parts."""
        return "+".join(self.parts)

    @property
    def step(self) -> int:
        """The steps that were counted."""
        return max((part.step for part in self.parts.values()), default=0)

    def __call__(self, f: Any, *args: Any, **options: Any) -> Tensor:
        """Return the sum of the penalties, and count a step.

        Args:
            f: the first argument of the call of each, see `gpkit.GradientPenalty`.
            *args: its other positional arguments.
            **options: its keyword arguments.

        Returns:
            A scalar to add to the loss.
        """
        args = shared(args)
        first, *others = [part(f, *args, **options) for part in self.parts.values()]
        for other in others:
            first = first + other
        return first

    def act(self, f: Any, *args: Any, **options: Any) -> dict[str, Terms | None]:
        """Return the terms of each part, by name, and count a step; None for one that is skipped.

        It takes the arguments of a call.
        """
        args = shared(args)
        return {name: part.act(f, *args, **options) for name, part in self.parts.items()}

    def terms(self, f: Any, *args: Any, **options: Any) -> dict[str, Terms]:
        """Return the terms of each part, by name, and count no step."""
        args = shared(args)
        return {name: part.terms(f, *args, **options) for name, part in self.parts.items()}

    def with_loss(self, closure: Callable[[], Any], net: Any, *, step: int | None = None) -> Tensor:
        """Return the loss and the penalties in the weights as one scalar, and count a step.

        Args:
            closure: gives the loss ``[]``, or losses ``[B]``, whose mean is trained on.
            net: the module, or its parameters.
            step: the optimiser step; None counts the calls.

        Returns:
            A scalar; see `gpkit.GradientPenalty`.
        """
        return with_loss(list(self.parts.values()), closure, net, step)

    def total(
        self,
        loss: Tensor | None,
        terms: Mapping[str, Terms | None],
        parameters: Callable[[], Iterable[Tensor]],
    ) -> Tensor | None:
        """Return the number that is trained on: (L + Σ penalties) / loss scale.

        Weights that adapt to gradients measure those of the loss and of their penalty.

        Args:
            loss: L, without penalties; None where they have a step of their own.
            terms: of this step, by name; None for a penalty that is skipped.
            parameters: gives those that are trained.

        Returns:
            One number; None if there is nothing to add up.
        """
        total = loss
        for name, term in terms.items():
            if term is None:
                continue
            total = term.penalty if total is None else term.added_to(total)
            if loss is not None and self.parts[name].measures:
                self.parts[name].measure(loss, term, parameters())
        scale = self.loss_scale()
        return total if total is None or scale == 1 else total / scale

    def loss_scale(self, step: int | None = None) -> float:
        """Return what the whole loss is divided by: the greatest that a `rescaled` weight asks for.

        Args:
            step: the optimiser step; None is that of the last call.
        """
        return max((part.loss_scale(step) for part in self.parts.values()), default=1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts, by name: plain numbers."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; a penalty that it does not have begins at its beginning."""
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict(state[name])

    def __repr__(self) -> str:
        return f"PenaltySum({self.parts!r})"


def shared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return positional arguments that several penalties can read: an iterator becomes a list."""
    return tuple(list(a) if isinstance(a, Iterator) else a for a in args)


def as_sum(penalty: Penalties | None) -> PenaltySum:
    """Return penalties by name.

    Args:
        penalty: one, which goes by its own name; a list of them; several by name; a sum; or None.
            A sum among them stands for its parts.

    Returns:
        Their sum; of None, the empty one.

    Raises:
        TypeError: if there is anything else.
        ValueError: if two in a list have the same name.
    """
    if penalty is None:
        return PenaltySum({})
    if isinstance(penalty, PenaltySum):
        return penalty
    if isinstance(penalty, Penalty):
        return PenaltySum({penalty.name: penalty})
    named: list[tuple[str, Penalty]] = []
    if isinstance(penalty, Mapping):
        for name, part in penalty.items():
            if isinstance(part, PenaltySum):
                named += [(f"{name}/{own}", p) for own, p in part.items()]
            elif isinstance(part, Penalty):
                named.append((name, part))
            else:
                raise TypeError(f"`penalty={{{name!r}: ...}}` must be a penalty; got {part!r}")
    elif isinstance(penalty, (list, tuple)) and all(
        isinstance(part, (Penalty, PenaltySum)) for part in penalty
    ):
        for part in penalty:
            named += list(as_sum(part).items())
    else:
        raise TypeError(
            f"`penalty=...` must be a penalty, or a list or dict of them; got {penalty!r}"
        )
    parts = dict(named)
    if len(parts) < len(named):
        raise ValueError(
            "`penalty=[...]` has two penalties of one name; name them in a dict, {'a': ...}, "
            f"or with name=...; got {', '.join(name for name, _ in named)}"
        )
    return PenaltySum(parts)
