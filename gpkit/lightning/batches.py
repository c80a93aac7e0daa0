"""Parts of a batch: inputs, targets and environments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.compat import tree_map_only

TARGETS = ("labels", "label", "targets", "target", "y")
ENVIRONMENTS = ("env", "environment")
Keys = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Batch:
    """A batch, read.

    Args:
        x: the input that penalties differentiate in, ``[B, *S]``.
        y: the target.
        env: the environment of each sample, ``[B]``; None if the batch has none.
        args: the positional arguments of the net, ``x`` among them or in ``kwargs``.
        kwargs: its keyword arguments.
        place: where ``x`` stands in them.
        places: where the entries of a batch with names stand in them.
    """

    x: Tensor
    y: Any
    env: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str = 0
    places: Mapping[Any, int | str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether ``x`` is the only input of the net."""
        return len(self.args) == 1 and not self.kwargs

    def call(self, net: nn.Module, x: Tensor) -> Any:
        """Call the net at ``x`` with the other inputs of the batch, repeated for more points."""
        return net(*self.args_at(x), **self.kwargs_at(x))

    def args_at(self, x: Tensor) -> tuple[Any, ...]:
        """Return the positional arguments for an input ``x``."""
        others = repeated(self.args, len(self.x), len(x))
        return tuple(x if i == self.place else v for i, v in enumerate(others))

    def kwargs_at(self, x: Tensor) -> dict[str, Any]:
        """Return the keyword arguments for an input ``x``."""
        others = repeated(self.kwargs, len(self.x), len(x))
        return {k: x if k == self.place else v for k, v in others.items()}

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with another tensor for each."""
        parts = self.x, self.y, self.env, self.args, self.kwargs
        x, y, env, args, kwargs = tree_map_only(Tensor, change, parts)
        return Batch(x, y, env, args, kwargs, self.place, self.places)

    def entries(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return inputs of the net by their names in the batch.

        Raises:
            TypeError: if the batch has no such entry, or it is no floating-point tensor.
        """
        found = {}
        for name in names:
            if name not in self.places:
                raise TypeError(
                    f"`wrt=gpkit.inputs(...)` names {name!r}, and the inputs of the net that have "
                    f"names in the batch are {list(self.places)}{checks.nearest(name, self.places)}"
                )
            place = self.places[name]
            value = self.args[place] if isinstance(place, int) else self.kwargs[place]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"`wrt=gpkit.inputs(...)` names {name!r}, which must be a floating-point "
                    f"tensor; got {kind}"
                )
            found[name] = value
        return found

    def at(self, entries: Mapping[str, Tensor]) -> Batch:
        """Return the batch with other entries, and the rest repeated for more points."""
        points = len(next(iter(entries.values())))
        parts = repeated((self.x, self.args, self.kwargs), len(self.x), points)
        now = {self.places[name]: value for name, value in entries.items()}
        args = tuple(now.get(i, v) for i, v in enumerate(parts[1]))
        kwargs = {k: now.get(k, v) for k, v in parts[2].items()}
        return replace(self, x=now.get(self.place, parts[0]), args=args, kwargs=kwargs)

    def environments(self) -> Tensor:
        """Return the environment of each sample; without any, the two halves of the batch."""
        if self.env is not None:
            return self.env
        size = len(self.x)
        return torch.arange(size, device=self.x.device) * 2 // size


def unpack(
    batch: Any,
    net: nn.Module,
    inputs: Keys = None,
    target: Keys = None,
    without: Collection[Any] = (),
) -> Batch:
    """Read a batch.

    Args:
        batch: ``(x, y)`` or ``(x, y, env)``, where x is a tensor, a tuple of the net's arguments or
            a dict of them by name; or a mapping, a dataclass or a named tuple.
        net: the net, whose ``forward`` says which names it takes.
        inputs: the keys of the net's inputs: names are passed by keyword, positions in the batch by
            position. None is all but the target, by keyword; if it is one, by position.
        target: the key of the target, or several. None is the first of `TARGETS` that there is.
        without: keys of entries that are for penalties alone, unless they are chosen here.

    Returns:
        The parts of the batch.

    Raises:
        TypeError: if it cannot be read.
    """
    named = _named(batch)
    if named is None and inputs is None and target is None:
        if without and isinstance(batch, (list, tuple)):
            batch = [v for i, v in enumerate(batch) if i not in without]
        if not (isinstance(batch, (list, tuple)) and len(batch) in (2, 3)):
            raise TypeError(_unreadable(batch))
        x, y, env = (*batch, None)[:3]
        if isinstance(x, Mapping):
            return _read((), dict(x), y, env, net)
        return _read(tuple(x) if isinstance(x, (list, tuple)) else (x,), {}, y, env, net)
    parts: Any = batch if named is None else named
    known = named if named is not None else range(len(batch))
    wanted = [key for key in TARGETS if key in known][:1] if target is None else _keys(target)
    environment = [key for key in ENVIRONMENTS if key in known][:1] if named is not None else []
    chosen = _keys(inputs)
    chosen = chosen or [key for key in known if key not in (*wanted, *environment, *without)]
    missing = [key for key in (*wanted, *chosen) if key not in known]
    if missing or not wanted or not chosen:
        raise TypeError(_unreadable(batch, f" with the keys {list(known)}", missing))
    y = parts[wanted[0]] if len(wanted) == 1 else {key: parts[key] for key in wanted}
    env = next((parts[key] for key in environment if key not in chosen), None)
    if len(chosen) == 1:
        return replace(_read((parts[chosen[0]],), {}, y, env, net), places={chosen[0]: 0})
    args = tuple(parts[key] for key in chosen if isinstance(key, int))
    kwargs = {key: parts[key] for key in chosen if isinstance(key, str)}
    return _read(args, kwargs, y, env, net)


def entries(keys: Iterable[tuple[str, Any]], batch: Any) -> dict[str, Any]:
    """Return what a penalty needs of a batch, by name.

    Args:
        keys: names with the key of an entry, or with a function of the batch.
        batch: as it came from the DataLoader.

    Returns:
        The entries.

    Raises:
        TypeError: if there is no such entry.

    >>> entries([("target", "forces"), ("metric", lambda batch: -batch["mask"])],
    ...         {"x": 1, "forces": 2, "mask": 3})
    {'target': 2, 'metric': -3}
    """
    found: dict[str, Any] = {}
    for name, key in keys:
        if callable(key):
            found[name] = key(batch)
            continue
        parts = _named(batch)
        known: Any = parts if parts is not None else range(len(batch))
        if key not in known:
            raise TypeError(
                f"a penalty needs {name}=, the entry {key!r} of the batch, which has "
                f"{list(known)}{checks.nearest(key, map(str, known))}: say which one is meant, "
                f"given={{{name!r}: ...}}"
            )
        found[name] = (batch if parts is None else parts)[key]
    return found


def _read(args: Any, kwargs: dict[str, Any], y: Any, env: Any, net: nn.Module) -> Batch:
    """Return a batch whose x is the first floating-point tensor, or else the first tensor."""
    if kwargs:
        parameters = inspect.signature(net.forward).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [key for key in kwargs if key not in parameters and not free]
        if unknown:
            known = [key for key in kwargs if key not in unknown]
            raise TypeError(
                f"{type(net).__name__}.forward takes no {', '.join(map(repr, unknown))}, which the "
                f"batch has: choose the inputs, PenalizedModule(..., inputs={known or ['name']})"
            )
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = [(k, v) for k, v in places if isinstance(v, Tensor)]
    if not found:
        raise TypeError(_unreadable(args or kwargs))
    place, x = next((pair for pair in found if pair[1].is_floating_point()), found[0])
    return Batch(x, y, env, args, kwargs, place, {key: key for key in kwargs})


def _named(batch: Any) -> dict[str, Any] | None:
    """Return the entries of a mapping, a dataclass or a named tuple with a target, else None."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if is_dataclass(batch):
        return {f.name: getattr(batch, f.name) for f in dataclass_fields(batch)}
    names = getattr(batch, "_fields", ())
    return dict(zip(names, batch, strict=True)) if set(names) & set(TARGETS) else None


def _keys(keys: Keys) -> list[str | int]:
    if keys is None:
        return []
    return [keys] if isinstance(keys, (str, int)) else list(keys)


def _unreadable(batch: Any, which: str = "", missing: Sequence[Any] = ()) -> str:
    absent = f", without {', '.join(map(repr, missing))}" if missing else ""
    return (
        "PenalizedModule takes batches (x, y), or (x, y, env), with a tensor x [B, ...], a tuple "
        f"or dict of tensors; or a mapping with a target under one of {', '.join(TARGETS)}; got "
        f"{type(batch).__name__}{which}{absent}: say which entries are meant, inputs=... and "
        "target=..., or use GradientPenaltyCallback with your own LightningModule"
    )


def repeated(y: Any, batch: int, points: int) -> Any:
    """Return the targets of a batch, repeated for a penalty with several points per sample.

    Args:
        y: the targets of the samples: a tensor ``[B, ...]``, or a nested structure of tensors.
        batch: the number of samples, B.
        points: the number of points at which the loss is evaluated; a multiple of B.

    Returns:
        The targets, ``[points, ...]``: those of the whole batch, then the same again.

    Raises:
        ValueError: if ``points`` is not a multiple of ``batch``.
    """
    if points == batch:
        return y
    if points % batch:
        raise ValueError(
            f'`of="loss"` needs a target for each point; got {points} points, which is no multiple '
            f'of the {batch} samples: use of="output", or the same number of points per sample'
        )

    def repeat(t: Tensor) -> Tensor:
        return torch.cat([t] * (points // batch)) if t.ndim else t

    return tree_map_only(Tensor, repeat, y)
