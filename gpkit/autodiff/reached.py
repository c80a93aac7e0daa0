"""What a function reaches: the modules that it runs, and the random numbers that it may draw."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 3  # from a function to what is in a list of an object in its closure
LEAVES = (Tensor, str, bytes, int, float, complex, type, types.ModuleType, type(None))


def reached(function: Any) -> tuple[list[nn.Module], list[Any]]:
    """Return the modules and the random generators that a function refers to.

    It looks at the function itself, the object of a method, the arguments of a partial, closures
    and globals, and in lists, dicts and attributes of objects that it finds there.

    Args:
        function: any callable, or a module.

    Returns:
        The modules, without their children; and generators of torch, NumPy and Python.
    """
    modules: list[nn.Module] = []
    generators: list[Any] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, LEAVES) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules.append(value)
        elif is_generator(value):
            generators.append(value)
        elif depth < DEPTH:
            for part in _parts(value):
                visit(part, depth + 1)

    visit(function, 0)
    return modules, generators


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)[:100]
    if isinstance(value, dict):
        return list(value.values())[:100]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        if (value.__module__ or "").partition(".")[0] == "torch":
            return ()
        cells = [c.cell_contents for c in value.__closure__ or () if _is_bound(c)]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [*cells, *named]
    found = [getattr(value, "__self__", None), *getattr(value, "__dict__", {}).values()]
    return found[:100]


def _is_bound(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def is_generator(value: Any) -> bool:
    """Whether an object is a stream of random numbers: of torch, of NumPy, or `random.Random`."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, (numpy.random.Generator, numpy.random.RandomState)
    )


def bookmark(generator: Any) -> Callable[[], None]:
    """Return a function that puts a stream of random numbers back to where it is now."""
    if hasattr(generator, "getstate"):  # of Python: the module random has it as well
        return functools.partial(generator.setstate, generator.getstate())
    if hasattr(generator, "get_state"):  # of torch, and NumPy's older ones
        return functools.partial(generator.set_state, generator.get_state())
    bits = generator.bit_generator
    return functools.partial(setattr, bits, "state", bits.state)


def reseed(generator: Any, seed: int) -> None:
    """Seed a stream of random numbers."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif hasattr(generator, "seed"):
        generator.seed(seed % 2**32)  # the limit of NumPy
    else:
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state


def shared() -> list[Any]:
    """Return the streams that all code shares, except torch's: Python's, and NumPy's if in use."""
    numpy = sys.modules.get("numpy")
    return [random] if numpy is None else [random, numpy.random]


def position(generator: Any) -> Any:
    """Return where a stream of `shared` is, to be compared."""
    if generator is random:
        return random.getstate()
    state = generator.get_state(legacy=False)["state"]
    return {k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in state.items()}
