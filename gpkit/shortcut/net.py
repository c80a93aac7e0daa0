"""What a net consists of, to tell whether it is as it was, and whether it is plain enough."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import (
    buffers_of,
    hooks_of,
    is_compiled,
)
from gpkit.autodiff.random import is_generator
from gpkit.autodiff.reached import SIMPLE, is_torchs, own_attributes, parts_of
from gpkit.autodiff.state import CONTAINERS
from gpkit.shortcut.compat import parts_of as parts_held

CHOSEN = operator.itemgetter(
    "of", "wrt", "scope", "order", "estimator", "elementary", "named", "forward", "metric",
    "given", "reduce", "subsample",
)  # fmt: skip
MODE = operator.attrgetter("training")


class Choices:
    """The choices on the axes of a penalty, to tell whether they are as they were."""

    def __init__(self, penalty: Any) -> None:
        self.chosen, self.norm = CHOSEN(vars(penalty)), penalty.form.norm

    def hold(self, penalty: Any) -> bool:
        """Whether the penalty has the same; its form may be another, of the same norm."""
        same = all(map(operator.is_, CHOSEN(vars(penalty)), self.chosen))
        return same and penalty.form.norm == self.norm


BYPASSED = {"act", "evaluate", "targets"}  # methods that a shortcut does not call


def is_overridden(penalty: Any) -> bool:
    """Whether a class of the user's own computes the penalty in a way of its own."""
    own = (kind for kind in type(penalty).__mro__ if not kind.__module__.startswith("gpkit."))
    return any(BYPASSED & vars(kind).keys() for kind in own)


class State:
    """What a net consists of, to tell whether it is as it was.

    These are its children, parameters, which of them are trained, buffers, hooks, modes and
    attributes. Nothing of it is kept alive, so a hook or an attribute may be another object with
    the id of one that is gone.

    Args:
        family: the net with all its children, each once.
        own: the places of modules with attributes of the user's own.
    """

    def __init__(self, family: Sequence[nn.Module], own: Sequence[int] = ()) -> None:
        parts = parts_of_all(family)
        self.parts = [*map(id, parts)]
        self.modes = [*map(MODE, family)]
        self.tensors = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
        self.trained = [parts[i].requires_grad for i in self.tensors]
        self.own = own
        self.attributes = [*map(id, self.attributes_of(family))]
        held = [*chain.from_iterable(map(hooks_of, family)), *map(own_attributes, family)]
        self.refs = [*filter(None, map(ref_to, chain.from_iterable(map(dict.values, held))))]

    def holds(self, family: Sequence[nn.Module]) -> bool:
        """Whether the net with these modules is as it was."""
        parts = parts_of_all(family)
        if [*map(id, parts)] != self.parts or [*map(MODE, family)] != self.modes:
            return False
        if [parts[i].requires_grad for i in self.tensors] != self.trained:
            return False
        if self.refs and None in [ref() for ref in self.refs]:
            return False
        return not self.own or [*map(id, self.attributes_of(family))] == self.attributes

    def attributes_of(self, family: Sequence[nn.Module]) -> Iterable[Any]:
        """Return all attributes of modules of the user's own types."""
        return chain.from_iterable([vars(family[i]).values() for i in self.own])


def ref_to(value: Any) -> weakref.ref[Any] | None:
    """Return a weak reference to a function or an object; None if it can have none."""
    try:
        return weakref.ref(value)
    except TypeError:
        return None


def parts_of_all(family: Sequence[nn.Module]) -> list[Any]:
    """Return the children, parameters, buffers and hooks of each module."""
    held = filter(None, chain.from_iterable(map(parts_held, family)))
    return [*chain.from_iterable(map(dict.values, held))]


ENOUGH = 100  # objects


def references(function: Any) -> list[int] | None:
    """Return the ids of the modules, functions and objects that a function refers to.

    It looks where `gpkit.autodiff.reached.reached` does, and further down, at less cost. A closure
    that is made anew at each step has the same; tensors, numbers and names in it do not count.

    Args:
        function: a function, a module, or a tuple of them.

    Returns:
        The ids, in the order in which they are found; None where there are too many, or where one
        is a stream of random numbers.
    """
    found: list[int] = []
    stack: list[Any] = [function]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind in SIMPLE:
            continue
        if kind is FunctionType:
            if id(value) not in seen:
                seen.add(id(value))
                code, closure = value.__code__, value.__closure__
                found.append(id(code))
                if not (value.__module__ or "").startswith("torch."):
                    try:
                        stack += [cell.cell_contents for cell in closure] if closure else ()
                    except ValueError:  # it is not bound yet
                        return None
                    stack += map(value.__globals__.get, code.co_names)
                    stack += value.__defaults__ or ()
                    stack += value.__kwdefaults__.values() if value.__kwdefaults__ else ()
        elif isinstance(value, nn.Module):
            found.append(id(value))
        elif kind is MethodType:  # made anew where it is asked for
            stack += value.__self__, value.__func__
        elif kind is partial:
            stack += value.func, *value.args, *value.keywords.values()
        elif kind is tuple or kind is list:
            stack += value[:ENOUGH]
        elif kind is dict:
            stack += [*value.values()][:ENOUGH]
        elif is_generator(value):
            return None
        elif id(value) not in seen:
            seen.add(id(value))
            found.append(id(value))
            stack += parts_of(value)
        if len(found) > ENOUGH:
            return None
    return found


def needs_more(module: nn.Module) -> bool:
    """Whether a module has what a forward pass may write to, or needs more than `run_plain`."""
    if isinstance(module, (torch.jit.ScriptModule, nn.RNNBase)) or is_compiled(module):
        return True
    values = own_attributes(module).values()
    written = any(isinstance(v, (Tensor, *CONTAINERS)) or is_generator(v) for v in values)
    return written or bool(buffers_of(module))


def may_attend(family: Sequence[nn.Module], kinds: Iterable[str]) -> bool:
    """Whether a net runs attention, or might in a later call: code of the user's own may branch.

    Args:
        family: the net with all its children.
        kinds: the classes of the nodes of its graph in a call.

    Returns:
        Whether kernels of attention have to be chosen.
    """
    if any("Softmax" in kind or "ScaledDot" in kind for kind in kinds):
        return True
    hooked = any(chain.from_iterable(map(hooks_of, family)))
    return hooked or not all(is_torchs(m) and "forward" not in vars(m) for m in family)


STILL = frozenset({
    nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear, nn.Conv1d,
    nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.ReLU,
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.LogSigmoid, nn.GroupNorm,
    nn.LayerNorm, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d,
})  # fmt: skip


def are_still(family: Sequence[nn.Module]) -> bool:
    """Whether modules are all torch's own that draw no random numbers, without hooks."""
    unhooked = not any(chain.from_iterable(map(hooks_of, family)))
    return unhooked and all(type(m) in STILL and "forward" not in vars(m) for m in family)


def sizes_of(family: Sequence[nn.Module]) -> list[int]:
    """Return the number of attributes of each module, which grows if its forward is replaced."""
    return [*map(len, map(vars, family))]
