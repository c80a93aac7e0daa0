"""What a function reaches: the modules that it runs, and streams of random numbers."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import buffers_of, children_of, hooks_of, parameters_of
from gpkit.autodiff.random import cells_of, is_generator, may_draw

DEPTH = 3  # from a function to what is in a list of an object in its closure
LEAVES = (Tensor, str, bytes, int, float, complex, type, types.ModuleType, type(None))
SIMPLE = frozenset({*LEAVES, nn.Parameter, bool})


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
        parts: the numbers that torch gave the forward hooks of its modules, and the ids of the code
            of what else they hold.
    """

    own: tuple[int, ...]
    may_draw: bool = False
    may_meet: bool = False
    facts: set[str] = field(default_factory=set)
    runs: int = 0
    graphs: dict[Any, Any] = field(default_factory=dict)
    parts: tuple[int, ...] = ()

    def look_at(self, family: Sequence[nn.Module]) -> None:
        """Forget what was seen in a run if modules have other hooks or hold other code since."""
        hooks = dict(hook for module in family for own in hooks_of(module) for hook in own.items())
        held = held_by([family[i] for i in self.own])
        now = (*hooks, *[id(code_of(value)) for value in held])
        if now != self.parts:
            self.parts = now
            self.facts -= SEEN_ONCE
            self.may_draw = self.may_draw or may_draw([*hooks.values(), *held])
            self.may_meet = not {*map(id, reached(held)[0])} <= {*map(id, family)}


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
        found = _KNOWN[key] = Known(own, may_draw([function, *family])), refs
    found[0].look_at(family)
    return Reach(family, streams, found[0])


def require_no_script(family: Iterable[nn.Module]) -> None:
    """Refuse scripted modules: optimised by torch, they detach their inputs.

    Raises:
        NotImplementedError: if one is among the modules.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in family):
        raise NotImplementedError(
            "Taylor mode cannot look into a scripted module: give it the net from before "
            "torch.jit.script, or use estimator='exact' or 'projection'"
        )


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
    while isinstance(function, functools.partial):
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


def held_by(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the functions and objects in attributes of modules, and in lists and dicts there."""
    found: list[Any] = []
    for module in modules:
        for value in own_attributes(module).values():
            if type(value) in SIMPLE:
                continue
            if isinstance(value, dict):
                found += [*value.values()][:100]
            elif isinstance(value, (list, tuple, set)):
                found += [*value][:100]
            else:
                found.append(value)
    return [value for value in found if type(value) not in SIMPLE]


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
        if type(value) in weakref.ProxyTypes:
            value = behind(value)
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


def behind(proxy: Any) -> nn.Module | None:
    """Return the module that a weak proxy stands for, as a Lightning trainer has one; else None."""
    try:
        return next(proxy.modules()) if isinstance(proxy, nn.Module) else None
    except ReferenceError:  # it is gone
        return None


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
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [
            *cells_of(value),
            *named,
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
        ]
    found = [getattr(value, "__self__", None), *getattr(value, "__dict__", {}).values()]
    return found[:100]
