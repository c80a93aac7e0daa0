"""What a function reaches: the modules that it runs, and the random numbers that it may draw."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import buffers_of, children_of, parameters_of

DEPTH = 3  # from a function to what is in a list of an object in its closure
LEAVES = (Tensor, str, bytes, int, float, complex, type, types.ModuleType, type(None))


@dataclass
class Known:
    """What earlier runs of a function have shown.

    Args:
        own: the places in the family of modules of the user's own types.
        facts: such as that it draws from torch alone.
        runs: how often it has run.
        graphs: what tells its graphs from those of other nets, by what they were made of.
    """

    own: tuple[int, ...]
    facts: set[str] = field(default_factory=set)
    runs: int = 0
    graphs: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Reach:
    """What a function reaches now.

    Args:
        family: the modules that it refers to, with their children.
        streams: the random generators that it refers to.
        known: what earlier runs have shown, of the same code with the same modules in the same
            modes. A module that is added, removed, replaced or put in another mode makes it anew.
    """

    family: list[nn.Module]
    streams: list[Any]
    known: Known

    @property
    def attributes(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """The modules with plain attributes of the user's own, and these."""
        owners = [self.family[i] for i in self.known.own]
        return [(owner, own) for owner in owners if (own := own_attributes(owner))]

    @property
    def looks(self) -> bool:
        """Whether this run is to be looked at closely; if not, it is taken for those before."""
        return self.known.runs % LOOK_AGAIN == 0

    @property
    def is_plain(self) -> bool:
        """Whether it is known to write to nothing, and to draw from torch's streams alone."""
        if self.looks or self.streams or not self.known.facts >= SEEN_ONCE:
            return False
        return not any(map(buffers_of, self.family)) and not self.attributes

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the family."""
        owned = map(parameters_of, self.family)
        return [p for own in owned if own for p in own.values() if p is not None]


# Facts that are seen in a first run.
TORCH_ALONE = "draws from torch alone"
NO_OTHERS = "runs no other modules than it refers to"
SEEN_ONCE = {TORCH_ALONE, NO_OTHERS}
LOOK_AGAIN = 100  # runs; a function may do something else on some of its runs


_KNOWN: dict[Any, tuple[Known, list[weakref.ref[Any]]]] = {}


def reach(function: Any) -> Reach:
    """Return what a function, a module or a tuple of them reaches now."""
    if isinstance(function, Reach):
        return function
    if isinstance(function, nn.Module):
        roots: list[nn.Module] = [function]
        streams: list[Any] = []
        code = None
    else:
        (roots, streams), code = reached(function), code_of(function)
    family = family_of(roots)
    key = (id(code), *map(id, family), *[module.training for module in family])
    found = _KNOWN.get(key)
    if found is None:
        parts = [code, *family] if code is not None else family
        refs = [weakref.ref(part, lambda _: _KNOWN.pop(key, None)) for part in parts]
        own = tuple(i for i, module in enumerate(family) if not is_torchs(module))
        found = _KNOWN[key] = Known(own), refs
    return Reach(family, streams, found[0])


def family_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return modules with all their children, each once."""
    found: dict[int, nn.Module] = {}
    stack: list[nn.Module | None] = list(modules)
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            children = children_of(module)
            if children:
                stack.extend(children.values())
    return list(found.values())


def code_of(function: Any) -> Any:
    """Return the code of a function, which is the same for each closure of it, or its type.

    Of a tuple, a function with its module, it is that of the function.
    """
    if isinstance(function, tuple) and function:
        function = function[0]
    while hasattr(function, "func"):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return type(function) if code is None else code


OF_EVERY_MODULE = vars(nn.Module()).keys()


def is_torchs(module: nn.Module) -> bool:
    """Whether a module has no plain attributes of the user's own, by its type."""
    # A metric has a state that its owner restores.
    return type(module).__module__.startswith(("torch.", "torchmetrics.", "gpkit."))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module of the user's own; none for those of torch."""
    if is_torchs(module):
        return {}
    return {k: v for k, v in vars(module).items() if k not in OF_EVERY_MODULE}


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
