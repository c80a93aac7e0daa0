"""What a net consists of, to tell whether it is as it was, and whether it is plain enough."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import (
    buffers_of,
    children_of,
    hooks_of,
    is_compiled,
    parameters_of,
)
from gpkit.autodiff.random import is_generator
from gpkit.autodiff.reached import is_torchs, own_attributes, parts_of
from gpkit.autodiff.state import CONTAINERS

CHOICES = operator.attrgetter(
    "of", "wrt", "scope", "order", "estimator", "elementary", "named", "forward", "metric",
    "given", "reduce", "subsample",
)  # fmt: skip
IN_TRAINING = operator.attrgetter("training")


def state_of(family: Sequence[nn.Module], own: Sequence[int]) -> tuple[Any, ...]:
    """Return what a net consists of, to be compared.

    These are its children, parameters, modes, hooks and attributes, and whether it has buffers.

    Args:
        family: the net with all its children, each once.
        own: the places of modules with attributes of the user's own.
    """
    children = [*map(children_of, family)]
    hooks = chain.from_iterable(map(hooks_of, family))
    parameters = [*chain.from_iterable(map(dict.values, map(parameters_of, family)))]
    return (
        [*map(len, children)],
        [*map(id, chain.from_iterable(map(dict.values, children)))],
        [*map(id, parameters)],
        [p.requires_grad for p in parameters if p is not None],
        [*map(IN_TRAINING, family)],
        any(map(buffers_of, family)),
        [*map(id, chain.from_iterable(map(dict.values, hooks)))],
        [[*map(id, vars(family[i]).values())] for i in own],
    )


SIMPLE = frozenset(
    {Tensor, nn.Parameter, bool, int, float, complex, str, bytes, type, type(None), ModuleType}
)
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
        if kind is tuple or kind is list:
            stack += value[:ENOUGH]
        elif kind is dict:
            stack += [*value.values()][:ENOUGH]
        elif kind is FunctionType:
            if id(value) not in seen:
                seen.add(id(value))
                code = value.__code__
                found.append(id(code))
                if not (value.__module__ or "").startswith("torch."):
                    try:
                        stack += [cell.cell_contents for cell in value.__closure__ or ()]
                    except ValueError:  # it is not bound yet
                        return None
                    stack += map(value.__globals__.get, code.co_names)
        elif isinstance(value, nn.Module):
            found.append(id(value))
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
