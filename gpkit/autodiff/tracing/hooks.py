"""Forward hooks, also inside of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gpkit.autodiff.tracing.calls import RECORDS, TRACES

Hook = Callable[..., Any]


def hooked(
    module: nn.Module,
    hook: Hook,
    *,
    with_kwargs: bool = False,
    before: bool = False,
    first: bool = False,
) -> Any:
    """Add a forward hook, and return a handle with a method ``remove``.

    Args:
        module: that is called.
        hook: ``(module, args, output) -> output`` or None.
        with_kwargs: whether the hook takes keyword arguments after ``args``.
        before: whether it is called before the module, with ``with_kwargs``:
            ``(module, args, kwargs) -> (args, kwargs)`` or None.
        first: whether it comes before the user's own hooks, which may change the output. In a graph
            it comes after them.

    Returns:
        The handle.
    """
    if TRACES:
        return InGraph(module, hook, with_kwargs, before)
    if RECORDS:
        RECORDS[-1].hooked(module)
    if before:
        return module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    return module.register_forward_hook(hook, with_kwargs=with_kwargs, prepend=first)


class InGraph:
    """A forward hook in a graph, where ``register_forward_hook`` cannot be traced.

    Its module has `dispatch` and `dispatch_before` as hooks, which are added outside of the graph.
    """

    def __init__(self, module: nn.Module, hook: Hook, with_kwargs: bool, before: bool) -> None:
        self.module, self.hook, self.with_kwargs = module, hook, with_kwargs
        self.before = before
        TRACES[-1].hooks.append(self)

    def remove(self) -> None:
        """Remove the hook."""
        TRACES[-1].hooks.remove(self)


def dispatch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Call the hooks of a module that are in the graph."""
    for own in TRACES[-1].hooks if TRACES else ():
        if own.module is module and not own.before:
            given = (args, kwargs) if own.with_kwargs else (args,)
            changed = own.hook(module, *given, output)
            output = output if changed is None else changed
    return output


def dispatch_before(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call the hooks of a module that are in the graph and come before it."""
    for own in TRACES[-1].hooks if TRACES else ():
        if own.module is module and own.before:
            args, kwargs = own.hook(module, args, kwargs) or (args, kwargs)
    return args, kwargs
