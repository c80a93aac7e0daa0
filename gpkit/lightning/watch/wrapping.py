"""Layers around the methods of a module, put on and taken off in any order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from torch import nn

Layer = Callable[..., Any]


class Layered:
    """Stands in for a method of a module: layers around it, the first of them the innermost.

    Args:
        module: the module; its class is left alone.
        name: of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.own = {key: module.__dict__[key] for key in [name] if key in module.__dict__}
        self.method = getattr(module, name)
        self.layers: list[Layer] = []
        self.call = self.method
        # Its signature is read, of dataloader_iter for example, through one wrap and no more.
        update_wrapper(self, inspect.unwrap(self.method))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the outermost layer."""
        return self.call(*args, **kwargs)

    def put_together(self) -> None:
        """Let each layer call the next, and the innermost the method."""
        self.call = self.method
        for layer in self.layers:
            self.call = partial(layer, self.call)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be the method itself in a copy of the module, or in a file: layers are about this one."""
        if self.own:
            return _itself, (self.own[self.name],)
        return getattr, (self.module, self.name)


def _itself(method: Any) -> Any:
    return method


def add(module: nn.Module, name: str, layer: Layer, *, inside: bool = False) -> Callable[[], None]:
    """Put a layer around a method of a module.

    Callbacks that each replaced the method would have to give it back in the opposite order, and
    Lightning calls them in one. Here any order will do: without layers the module is as it was.

    Args:
        module: the module.
        name: of the method.
        layer: ``(call, *args, **kwargs) -> result``, call being what the layer is around.
        inside: whether it goes inside of the layers that are there, or around them.

    Returns:
        A function that takes the layer off; called again, it does nothing.

    >>> module = nn.Identity()
    >>> off = add(module, "forward", lambda call, x: call(x) + 1)
    >>> module(1)
    2
    >>> off()
    >>> module(1), "forward" in module.__dict__
    (1, False)
    """
    there = module.__dict__.get(name)
    layered = there if isinstance(there, Layered) else Layered(module, name)
    module.__dict__[name] = layered
    layered.layers.insert(0 if inside else len(layered.layers), layer)
    layered.put_together()

    def off() -> None:
        if layer not in layered.layers:
            return
        layered.layers.remove(layer)
        layered.put_together()
        if not layered.layers and module.__dict__.get(name) is layered:
            del module.__dict__[name]
            module.__dict__.update(layered.own)

    return off
