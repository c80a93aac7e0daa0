"""PenaltySum: several penalties, each with its own name, weight and state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from functools import partial
from typing import Any

from torch import Tensor, nn

from gpkit.findings.seen import Unchecked
from gpkit.formula import Terms
from gpkit.penalty import Penalty
from gpkit.with_loss import with_loss

Penalties = Penalty | Mapping[str, Penalty] | Iterable[Penalty]


class PenaltySum(Mapping[str, Penalty]):
    r"""The sum of several penalties, and a mapping from names to them.

    .. math:: \sum_p P_p

    Call it as you call each part. Lightning modules and callbacks log each part under its name.

    Args:
        parts: penalties by name.

    >>> import gpkit, torch
    >>> penalty = PenaltySum({"r1": gpkit.r1(weight=2.0), "slope": gpkit.input_grad_norm(3.0)})
    >>> penalty(lambda x: 2 * x[:, 0], torch.zeros(4, 2)).item()  # (2/2)·4 + 3·4
    16.0
    """

    def __init__(self, parts: Mapping[str, Penalty]) -> None:
        self.parts = dict(parts)

    def __getitem__(self, name: str) -> Penalty:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    # Those of the dict itself: the ones of Mapping look every part up again, at every step.

    def keys(self) -> KeysView[str]:
        """Return the names of the parts."""
        return self.parts.keys()

    def values(self) -> ValuesView[Penalty]:
        """Return the parts."""
        return self.parts.values()

    def items(self) -> ItemsView[str, Penalty]:
        """Return the names with their parts."""
        return self.parts.items()

    @property
    def name(self) -> str:
        """The names of the parts, joined by "+"."""
        return "+".join(self.parts)

    @property
    def step(self) -> int:
        """The number of steps counted so far: the largest of the parts."""
        return max((part.step for part in self.parts.values()), default=0)

    def __call__(self, f: Any, *args: Any, **options: Any) -> Tensor:
        """Return the sum of the penalties, and count a step.

        Args:
            f: the first argument for each part, see `gpkit.GradientPenalty`.
            *args: the other positional arguments.
            **options: the keyword arguments.

        Returns:
            A scalar to add to the loss.
        """
        args = shared(args)
        first, *others = [part(f, *args, **options) for part in self.parts.values()]
        for other in others:
            first = first + other
        return first

    def act(self, f: Any, *args: Any, **options: Any) -> dict[str, Terms | None]:
        """Return the terms of each part by name, and count a step; None for a skipped part.

        Takes the arguments of a call.
        """
        args = shared(args)
        return {name: part.act(f, *args, **options) for name, part in self.parts.items()}

    def terms(self, f: Any, *args: Any, **options: Any) -> dict[str, Terms]:
        """Return the terms of each part by name, without counting a step."""
        args = shared(args)
        return {name: part.terms(f, *args, **options) for name, part in self.parts.items()}

    def with_loss(self, closure: Callable[[], Any], net: Any, *, step: int | None = None) -> Tensor:
        """Return the loss and the weight penalties as one scalar, and count a step.

        See `gpkit.GradientPenalty.with_loss`.

        Args:
            closure: returns the loss ``[]``, or losses ``[B]``, whose mean is trained on.
            net: the module, or its parameters.
            step: the optimiser step; None counts the calls.

        Returns:
            The scalar loss + Σ penalties.
        """
        return with_loss(list(self.parts.values()), closure, net, step).total

    def total(
        self,
        loss: Tensor | None,
        terms: Mapping[str, Terms | None],
        parameters: Callable[[], Iterable[Tensor]],
    ) -> Tensor | None:
        """Return the total loss, (L + Σ penalties) / loss scale.

        Weights that adapt to gradients measure those of the loss and of their penalty here.

        Args:
            loss: L, without penalties; None if the penalties have an optimiser step of their own.
            terms: the terms of this step by name; None for a skipped penalty.
            parameters: returns the trained parameters.

        Returns:
            A scalar; None if there is no loss and no penalty.
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
        """Return the number that divides the total loss: the largest of the parts.

        Args:
            step: the optimiser step; None is the step of the last call.
        """
        return max((part.loss_scale(step) for part in self.parts.values()), default=1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts by name, as plain numbers."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. A penalty without an entry in it is left as it is."""
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict(state[name])

    def __repr__(self) -> str:
        return f"PenaltySum({self.parts!r})"


def register_penalty(module: nn.Module, name: str, penalty: Penalty | PenaltySum) -> None:
    """Make a penalty an attribute of a module, and its state a part of the module's state.

    ``module.state_dict()`` holds the penalty's state, plain numbers, under ``name``, and
    ``load_state_dict`` restores it, also with ``strict=True`` and as a part of other modules. A
    state without it, as from before the penalty was registered, leaves the penalty as it is.

    >>> import gpkit, torch
    >>> critic = torch.nn.Linear(2, 1)
    >>> register_penalty(critic, "slope", gpkit.r1())
    >>> _ = critic.slope(critic, real=torch.ones(3, 2))
    >>> critic.state_dict()["slope"]["step"]
    1

    Args:
        module: any module. Copies of it have penalties of their own.
        name: the attribute.
        penalty: a penalty, or a `gpkit.sum`.

    Raises:
        TypeError: if ``penalty`` is no penalty.
        ValueError: if the module has an attribute of that name.
    """
    if not isinstance(penalty, (Penalty, PenaltySum)):
        raise TypeError(f"`register_penalty` takes a penalty, or a gpkit.sum; got {penalty!r}")
    if not name.isidentifier() or hasattr(module, name):
        raise ValueError(
            f"`register_penalty` needs the name of a new attribute of the {type(module).__name__}; "
            f"got {name!r}"
        )
    setattr(module, name, penalty)
    module.register_state_dict_post_hook(partial(_save, name))
    module.register_load_state_dict_pre_hook(partial(_load, name))


def _save(name: str, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + name] = getattr(module, name).state_dict()


def _load(name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    saved = state.pop(prefix + name, None)  # else a strict load would not know the key
    if saved is not None:
        getattr(module, name).load_state_dict(saved)


def shared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with each iterator as a list, so that several penalties can read it."""
    return tuple(list(a) if isinstance(a, Iterator) else a for a in args)


def as_sum(penalty: Penalties | None) -> PenaltySum:
    """Return one or several penalties as a `PenaltySum`.

    Args:
        penalty: a penalty, a list of penalties, a dict of them by name, a sum, or None. In a list
            each penalty goes by its own name. A sum in a list or dict is replaced by its parts.

    Returns:
        The sum; an empty one for None.

    Raises:
        TypeError: if it is anything else.
        ValueError: if two penalties have the same name.
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
                raise TypeError(
                    f"`penalty={{{name!r}: ...}}` must be a penalty; got {uncalled(part)}"
                )
    elif isinstance(penalty, (list, tuple)) and all(
        isinstance(part, (Penalty, PenaltySum)) for part in penalty
    ):
        for part in penalty:
            named += list(as_sum(part).items())
    else:
        raise TypeError(
            f"`penalty=...` must be a penalty, or a list or dict of them; got {uncalled(penalty)}"
        )
    parts = dict(named)
    if len(parts) < len(named):
        raise ValueError(
            "`penalty=[...]` has two penalties with the same name; use a dict, {'a': ...}, "
            f"or name=...; got {', '.join(name for name, _ in named)}"
        )
    return PenaltySum(parts)


def examined(penalties: Mapping[str, Penalty], doctor: bool) -> bool:
    """Take every net for one that has been looked at, for penalties without a doctor.

    Args:
        penalties: by name.
        doctor: whether they are checked at their first step.

    Returns:
        ``doctor``.

    Raises:
        TypeError: if it is neither True nor False.
    """
    if not isinstance(doctor, bool):
        raise TypeError(f"`doctor=...` must be True or False; got {doctor!r}")
    if not doctor:
        for penalty in penalties.values():
            penalty.seen = Unchecked()
    return doctor


def uncalled(given: Any) -> str:
    """Return what was given instead of a penalty; for a preset that was not called, how to."""
    given = next(iter(given), None) if isinstance(given, (list, tuple)) else given
    if inspect.isfunction(given) or isinstance(given, type):
        name = given.__name__
        return f"the {'class' if isinstance(given, type) else 'function'} {name}: call it, {name}()"
    return repr(given)
