"""Inputs by name: in the call of a module, or in a batch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from gpkit import checks
from gpkit.lightning.batches import repeated

DEPTH = 4  # of a nested structure that is searched
Path = tuple[Any, ...]  # the keys and indices that lead to an entry
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call


def path_in_call(net: nn.Module, call: Arguments, name: str) -> Path | None:
    """Return where a call of a module has a tensor of that name; None if it has none.

    It is a keyword argument, the argument of that name in the signature of ``forward``, or an entry
    of an argument that is a dict, a dataclass, a named tuple, or a list of such.
    """
    args, kwargs = call
    if isinstance(kwargs.get(name), Tensor):
        return 1, name
    for i, own in enumerate(_positions(net)[: len(args)]):
        if own == name and isinstance(args[i], Tensor):
            return 0, i
    return path_in(call, name)


def path_in(structure: Any, name: str) -> Path | None:
    """Return where a nested structure has a tensor of that name; the outermost first.

    Raises:
        ValueError: if it has two of them.
    """
    found = [path for path, _ in _tensors(structure) if path[-1] == name]
    found = [path for path in found if len(path) == len(found[0])]
    if len(found) > 1:
        places = ", ".join(".".join(map(str, path)) for path in found)
        raise ValueError(
            f"`wrt=gpkit.inputs(...)` names {name!r}, and there are several tensors of that name, "
            f"{places}: give them different names"
        )
    return found[0] if found else None


def path_of(structure: Any, tensor: Tensor | None) -> Path | None:
    """Return where a nested structure has a tensor itself; None if it does not have it."""
    return next((path for path, part in _tensors(structure) if part is tensor), None)


def names_in(structure: Any) -> list[str]:
    """Return the names of all tensors in a nested structure."""
    names = [path[-1] for path, _ in _tensors(structure)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def entry(structure: Any, path: Path) -> Any:
    """Return an entry of a nested structure."""
    for key in path:
        structure = dict(_children(structure))[key]
    return structure


def replaced(structure: Any, path: Path, value: Tensor) -> Any:
    """Return a nested structure with another entry; the structure itself is left as it is."""
    if not path:
        return value
    key = path[0]
    part = replaced(dict(_children(structure))[key], path[1:], value)
    if isinstance(structure, Mapping):
        if type(structure) is dict or not isinstance(structure, MutableMapping):
            return {**structure, key: part}  # a copy of a dict is not traced
        changed = copy.copy(structure)
        changed[key] = part
        return changed
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*[part if k == key else v for k, v in _children(structure)])
    if isinstance(structure, (list, tuple)):
        return type(structure)([*structure[:key], part, *structure[key + 1 :]])
    changed = copy.copy(structure)
    object.__setattr__(changed, key, part)
    return changed


def moved_to(structure: Any, entries: Mapping[Path, Tensor]) -> Any:
    """Return a nested structure with other entries, and the rest repeated for more points."""
    for path, value in entries.items():
        before = len(entry(structure, path))
        structure = structure if before == len(value) else repeated(structure, before, len(value))
        structure = replaced(structure, path, value)
    return structure


def net_of_entries(
    net: nn.Module, call: Arguments, paths: Sequence[Path]
) -> Callable[[Mapping[str, Tensor]], Any]:
    """Return a module as a function of a dict of some of its inputs, with the others of a call."""

    def function(entries: Mapping[str, Tensor]) -> Any:
        args, kwargs = moved_to(call, dict(zip(paths, entries.values(), strict=True)))
        return net(*args, **kwargs)

    return function


def finding_of_entry(name: str, title: str, call: Arguments | None, batch: Any) -> str:
    """Return the line for a name that neither a call nor the batch has."""
    own = [] if call is None else names_in(call)
    here = names_in(batch)
    return (
        f"`wrt=gpkit.inputs(...)` names {name!r}, and {title} is called with {own}, and the batch "
        f"has {here}{checks.nearest(name, [*own, *here])}: name tensors that it gets by keyword, "
        "by the names in its forward(...), or in a dict"
    )


def finding_of_kind(name: str, value: Tensor) -> str:
    """Return the line for an entry that has no gradient."""
    return (
        f"`wrt=gpkit.inputs(...)` names {name!r}, which must be a floating-point tensor; got "
        f"{value.dtype}"
    )


def _children(structure: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a structure with their keys, indices or attributes."""
    if isinstance(structure, Mapping):
        yield from structure.items()
    elif isinstance(structure, tuple) and hasattr(structure, "_fields"):
        yield from zip(structure._fields, structure, strict=True)
    elif isinstance(structure, (list, tuple)):
        yield from enumerate(structure)
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        yield from ((f.name, getattr(structure, f.name)) for f in dataclasses.fields(structure))
    elif not isinstance(structure, (Tensor, nn.Module, str)) and not callable(structure):
        yield from getattr(structure, "__dict__", {}).items()


def _tensors(structure: Any) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors of a nested structure with their paths; the outermost first."""
    level: list[tuple[Path, Any]] = [((), structure)]
    for _ in range(DEPTH):
        level = [((*path, key), part) for path, v in level for key, part in _children(v)]
        yield from ((path, part) for path, part in level if isinstance(part, Tensor))


def _positions(net: nn.Module) -> list[str]:
    """Return the names of the arguments of a module that can be given by position."""
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):  # a scripted one
        return []
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in named]
