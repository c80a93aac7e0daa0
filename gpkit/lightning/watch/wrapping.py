"""Wrap a method of a module, so that wrappers can be removed in any order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from torch import nn

Wrapper = Callable[..., Any]


class WrappedMethod:
    """Replaces a method of one module instance, and calls the method through its wrappers.

    It lies in the module's ``__dict__``; the module's class stays unchanged.

    Args:
        module: the module.
        name: the name of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        # What the instance's __dict__ had under this name, if anything: it is put back at the end.
        self.own = {key: module.__dict__[key] for key in [name] if key in module.__dict__}
        self.method = getattr(module, name)
        self.wrappers: list[Wrapper] = []  # the innermost first
        self.call = self.method
        # Lightning looks for `dataloader_iter` in the signature, and unwraps one level only.
        update_wrapper(self, inspect.unwrap(self.method))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the outermost wrapper."""
        return self.call(*args, **kwargs)

    def compose(self) -> None:
        """Make each wrapper call the next inner one, and the innermost the method."""
        self.call = self.method
        for wrapper in self.wrappers:
            self.call = partial(wrapper, self.call)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deepcopy as the unwrapped method: the wrappers belong to this module only."""
        if self.own:
            return _identity, (self.own[self.name],)
        return getattr, (self.module, self.name)


def _identity(method: Any) -> Any:
    return method


def wrap(
    module: nn.Module, name: str, wrapper: Wrapper, *, innermost: bool = False
) -> Callable[[], None]:
    """Wrap a method of a module, and return a function that removes the wrapper.

    Wrappers can be removed in any order. If each callback replaced the method itself, the callbacks
    would have to restore it in reverse order, but Lightning calls their hooks in the same order at
    the start and at the end of a fit. Once the last wrapper is removed, the module is as before.

    Args:
        module: the module.
        name: the name of the method.
        wrapper: ``(call, *args, **kwargs) -> result``, where ``call`` is the next inner wrapper, or
            the method.
        innermost: whether the new wrapper is called last, directly around the method. By default it
            is called first.

    Returns:
        A function that removes the wrapper. A second call of it does nothing.

    >>> module = nn.Identity()
    >>> unwrap = wrap(module, "forward", lambda call, x: call(x) + 1)
    >>> module(1)
    2
    >>> unwrap()
    >>> module(1), "forward" in module.__dict__
    (1, False)
    """
    existing = module.__dict__.get(name)
    wrapped = existing if isinstance(existing, WrappedMethod) else WrappedMethod(module, name)
    module.__dict__[name] = wrapped
    wrapped.wrappers.insert(0 if innermost else len(wrapped.wrappers), wrapper)
    wrapped.compose()

    def unwrap() -> None:
        if wrapper not in wrapped.wrappers:
            return
        wrapped.wrappers.remove(wrapper)
        wrapped.compose()
        if not wrapped.wrappers and module.__dict__.get(name) is wrapped:
            del module.__dict__[name]
            module.__dict__.update(wrapped.own)

    return unwrap
