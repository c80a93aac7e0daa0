"""What a function reaches: the modules that it runs, and the random numbers that it may draw."""

from __future__ import annotations

import functools
import inspect
import random
import types
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.compat import buffers_of, children_of, hooks_of, parameters_of
from gpkit.autodiff.random import is_generator

DEPTH = 3  # from a function to what is in a list of an object in its closure
LEAVES = (Tensor, str, bytes, int, float, complex, type, types.ModuleType, type(None))


@dataclass
class Known:
    """What earlier runs of a function have shown.

    Args:
        own: the places in the family of modules of the user's own types.
        may_draw: whether it may draw from NumPy or Python.
        may_meet: whether its modules hold others, which they may run.
        facts: such as that it draws from torch alone.
        runs: how often it has run.
        graphs: what tells its graphs from those of other nets, by what they were made of.
        hooks: the numbers that torch gave the forward hooks of its modules.
    """

    own: tuple[int, ...]
    may_draw: bool = False
    may_meet: bool = False
    facts: set[str] = field(default_factory=set)
    runs: int = 0
    graphs: dict[Any, Any] = field(default_factory=dict)
    hooks: tuple[int, ...] = ()

    def look_at(self, hooks: Iterable[tuple[int, Any]]) -> None:
        """Find out whether forward hooks may draw, where there are others than before."""
        now = dict(hooks)
        if tuple(now) != self.hooks:
            self.hooks = tuple(now)
            if may_draw(now.values()):
                self.may_draw = True
                self.facts.discard(TORCH_ALONE)


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
CHECKPOINTS = "runs parts again in the backward pass"
SEEN_ONCE = {TORCH_ALONE, NO_OTHERS}
LOOK_AGAIN = 100  # runs; a function may run other modules on some of its runs


_KNOWN: dict[Any, tuple[Known, list[weakref.ref[Any]]]] = {}


def reach(function: Any) -> Reach:
    """Return what a function, a module or a tuple of them reaches now."""
    if isinstance(function, Reach):
        return function
    if isinstance(function, nn.Module):
        roots: list[nn.Module] = [function]
        streams: list[Any] = []
        codes: list[Any] = []
    else:
        roots, streams, codes = reached(function)
        codes.append(code_of(function))
    family = family_of(roots)
    key = (*map(id, [*codes, *family]), *[module.training for module in family])
    found = _KNOWN.get(key)
    if found is None:
        refs = [weakref.ref(part, lambda _: _KNOWN.pop(key, None)) for part in (*codes, *family)]
        own = tuple(i for i, module in enumerate(family) if not is_torchs(module))
        known = Known(own, may_draw([function, *family]), holds_others(family))
        found = _KNOWN[key] = known, refs
    found[0].look_at(hook for module in family for own in hooks_of(module) for hook in own.items())
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


def holds_others(family: list[nn.Module]) -> bool:
    """Whether modules hold others that they do not own, such as in a tuple, and so may run them."""
    held = [[*own_attributes(module).values()] for module in family]
    return not {*map(id, reached(held)[0])} <= {*map(id, family)}


def reached(function: Any) -> tuple[list[nn.Module], list[Any], list[Any]]:
    """Return the modules, the random generators and the functions that a function refers to.

    It looks at the function itself, the object of a method, the arguments of a partial, closures,
    defaults and globals, and in lists, dicts and attributes of objects that it finds there.

    Args:
        function: any callable, or a module.

    Returns:
        The modules, without their children; generators of torch, NumPy and Python; and the code of
        functions.
    """
    return values_of(function)[:3]


def values_of(function: Any) -> tuple[list[nn.Module], list[Any], list[Any], list[Any]]:
    """Return what `reached` does, and all other objects that a function refers to."""
    modules: list[nn.Module] = []
    generators: list[Any] = []
    codes: list[Any] = []
    others: list[Any] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, LEAVES) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules.append(value)
        elif is_generator(value):
            generators.append(value)
        else:
            others.append(value)
            if depth < DEPTH:
                if inspect.isfunction(value):
                    codes.append(value.__code__)
                for part in parts_of(value):
                    visit(part, depth + 1)

    visit(function, 0)
    return modules, generators, codes, others


def parts_of(value: Any) -> Iterable[Any]:
    """Return what a function, a container or an object refers to."""
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
        return [*cells, *named, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    found = [getattr(value, "__self__", None), *getattr(value, "__dict__", {}).values()]
    return found[:100]


def _is_bound(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


# Packages whose code draws from no stream of NumPy or Python; whose objects hold no user's code.
TRUSTED = {"torch", "torchmetrics", "gpkit", "builtins", "pytorch_lightning", "lightning"}
CLOSED = {"builtins", "pytorch_lightning", "lightning"}
FOREIGN = {"numpy", "random"}
ENOUGH = 2000  # functions and objects that are read


def may_draw(roots: Iterable[Any]) -> bool:
    """Whether the code of functions or modules names NumPy or `random`, however far down.

    It is read, not run, so that a function that draws on some of its runs is known from the first.
    The answer is yes where there is too much code to read.

    Args:
        roots: functions, modules or objects.

    Returns:
        False if no name in it stands for NumPy, `random` or one of their streams.
    """
    stack = list(roots)
    seen: dict[int, Any] = {}  # with the objects, so that no id is used again
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (Tensor, str, bytes, int, float, complex)):
            continue
        seen[id(value)] = value
        foreign = package_of(value) in FOREIGN or is_generator(getattr(value, "__self__", None))
        if foreign or is_generator(value) or len(seen) > ENOUGH:
            return True
        stack += _read(value)
    return False


def package_of(value: Any) -> str:
    """Return the package that a module, a function, a class or an object is from."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0]
    name = getattr(value, "__module__", None)
    return (name if isinstance(name, str) else type(value).__module__).partition(".")[0]


def _read(value: Any) -> list[Any]:
    """Return what a function, a class or an object refers to, by its code or its attributes."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if inspect.isfunction(value):
        cells = [c.cell_contents for c in value.__closure__ or () if _is_bound(c)]
        return cells if package_of(value) in TRUSTED else [*cells, *_named(value)]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, (types.MethodType, types.BuiltinMethodType, classmethod, staticmethod)):
        return [getattr(value, "__self__", None), getattr(value, "__func__", None)]
    package = package_of(value)
    if isinstance(value, types.ModuleType) or package in CLOSED:
        return []
    if isinstance(value, type):
        return [] if package in TRUSTED else [*vars(value).values(), *value.__bases__]
    return [type(value), *getattr(value, "__dict__", {}).values()]


def _named(function: types.FunctionType) -> list[Any]:
    """Return what the names in the code of a function stand for."""
    codes = [function.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    names = {name for code in codes for name in code.co_names}
    if any(name.partition(".")[0] in FOREIGN for name in names):
        return [random]  # which it may import itself
    found = [function.__globals__.get(name) for name in names]
    inside = {id(v): v for v in found if isinstance(v, types.ModuleType)}
    for module in (modules := list(inside.values())):
        parts = [vars(module).get(name) for name in names]
        found += parts
        new = {id(v): v for v in parts if isinstance(v, types.ModuleType) and id(v) not in inside}
        inside |= new
        modules += new.values()
    return [*found, function.__defaults__, function.__kwdefaults__]
