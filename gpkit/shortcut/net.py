"""What a net consists of, to tell whether it is as it was, and whether it is plain enough."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
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
from gpkit.autodiff.reached import own_attributes
from gpkit.autodiff.state import CONTAINERS

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


def needs_more(module: nn.Module) -> bool:
    """Whether a module has what a forward pass may write to, or needs more than `run_plain`."""
    if isinstance(module, (torch.jit.ScriptModule, nn.RNNBase)) or is_compiled(module):
        return True
    values = own_attributes(module).values()
    written = any(isinstance(v, (Tensor, *CONTAINERS)) or is_generator(v) for v in values)
    return written or bool(buffers_of(module))
