"""What a forward pass starts from and leaves behind: buffers, attributes and random numbers."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkit.autodiff.compat import COMPILED_CLASS, buffers_of, compiled_call_of, put_buffer
from gpkit.autodiff.random import RandomState, random_state
from gpkit.autodiff.reached import bookmark, is_generator, position, reached, reseed, shared

CONTAINERS = (list, dict, set, deque)
OF_EVERY_MODULE = vars(nn.Module()).keys()


@dataclass(eq=False)
class Start:
    """What a forward pass started from, with which `isolated` repeats it.

    Args:
        torch: the states of torch's random numbers.
        streams: put other streams of random numbers back to where they were.
        modules: the buffers and attributes of each module, copied.
    """

    torch: RandomState
    streams: list[Callable[[], None]]
    modules: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]]


def start_of(function: Any, device: torch.device) -> Start:
    """Return what a forward pass of a function starts from, if it runs now.

    Args:
        function: the function, or the module that it runs.
        device: the device of the forward pass.
    """
    modules, streams = parts_of(function)
    kept = {}
    for owner in {part: None for module in modules for part in module.modules()}:
        attributes = own_attributes(owner)
        streams += filter(is_generator, attributes.values())
        kept[owner] = (
            {name: copied(buffer) for name, buffer in buffers_of(owner).items()},
            {name: copied(value) for name, value in attributes.items()},
        )
    streams += () if recalls(function, "draws from torch alone") else shared()
    return Start(random_state(device), [bookmark(s) for s in streams], kept)


@contextmanager
def own_streams(function: Any, seed: int | Start) -> Iterator[None]:
    """Let a function draw from a seed, or as from a start; then put its streams back.

    These are the generators that it refers to, and the streams of Python and NumPy: not torch's.
    Whether it draws from the latter two at all is found out in its first run.
    """
    modules, streams = parts_of(function)
    for owner in (part for module in modules for part in module.modules()):
        streams += filter(is_generator, own_attributes(owner).values())
    new = not recalls(function, "draws from torch alone")
    streams += shared() if new else ()
    if not streams:
        yield
        return
    back = [bookmark(s) for s in streams]
    try:
        if isinstance(seed, Start):
            for again in seed.streams:
                again()
        else:
            for stream in streams:
                reseed(stream, seed)
        before = [position(s) for s in shared()] if new else []
        yield
        if new and before == [position(s) for s in shared()]:
            remember(function, "draws from torch alone")
    finally:
        for put_back in back:
            put_back()


@contextmanager
def own_state(
    function: Any, start: Start | None = None, *, evaluating: bool = False
) -> Iterator[None]:
    """Let modules write to copies of their buffers and attributes; put the originals back.

    The original tensors are put back, and never written to, because graphs may have saved them.
    Modules that the function refers to get copies before it runs, and get their originals back even
    if the forward pass replaced a buffer. A global hook finds other modules when they are called.
    torch.compile would trace that hook, so it is left out if the function refers to a compiled
    module.

    Args:
        function: the function to be called, or a module that it runs.
        start: what the copies are of; None is the present state.
        evaluating: whether the modules are put in eval mode meanwhile.

    Yields:
        Nothing.
    """
    trained: list[nn.Module] = []
    swapped: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    seen: set[nn.Module] = set()
    known = 0

    def swap(module: nn.Module, _: Any = None) -> None:
        if module in seen:
            return
        for owner in module.modules():
            if owner in seen:
                continue
            seen.add(owner)
            then, now = start.modules.get(owner) if start else None, own_attributes(owner)
            if evaluating and owner.training:
                trained.append(owner)
                owner.training = False
            for name, buffer in list(buffers_of(owner).items()):
                if buffer is not None:
                    copy = copied(buffer if then is None else then[0].get(name, buffer))
                    swapped.append((owner, name, buffer, copy))
                    put(owner, name, copy)
            if now:
                attributes.append((owner, now))
                vars(owner).update({k: copied(v) for k, v in (then[1] if then else now).items()})

    named = parts_of(function)[0]
    compiled = any(
        compiled_call_of(m) is not None or type(m).__name__ == COMPILED_CLASS
        for owner in named
        for m in owner.modules()
    )
    hook = None if compiled else register_module_forward_pre_hook(swap)
    try:
        for owner in named:
            swap(owner)
        known = len(swapped)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for owner in trained:
            owner.training = True
        for i, (module, name, original, copy) in enumerate(swapped):
            # For a module found by the hook, functional_call may have swapped in its own tensor
            # first: it puts the original back itself, and `original` is the swapped-in tensor.
            if i < known or getattr(module, name, None) is copy:
                put(module, name, original)
        for module, own in attributes:
            for name in own_attributes(module).keys() - own.keys():
                del vars(module)[name]
            vars(module).update(own)


def put(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Replace a buffer of a module."""
    if isinstance(module, torch.jit.ScriptModule):
        put_buffer(module, name, buffer)
    else:
        buffers_of(module)[name] = buffer


def parts_of(function: Any) -> tuple[list[nn.Module], list[Any]]:
    """Return the modules and generators that a function reaches; a module has its own alone."""
    return ([function], []) if isinstance(function, nn.Module) else reached(function)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module of the user's own; none for those of torch."""
    if type(module).__module__.startswith(("torch.", "torchmetrics.", "gpkit.")):
        return {}  # a metric has a state that its owner restores
    return {k: v for k, v in vars(module).items() if k not in OF_EVERY_MODULE}


def copied(value: Any) -> Any:
    """Return a copy of a tensor without a graph, or of a list, dict or set; else the value."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    return type(value)(value) if type(value) in CONTAINERS else value


# What is known about functions that have run before, by what they are made of.

_KNOWN: dict[int, tuple[weakref.ref[Any], set[str]]] = {}


def _made_of(function: Any) -> list[Any]:
    while hasattr(function, "func"):
        function = function.func
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return [*parts_of(function)[0], *([] if code is None else [code])] or [type(function)]


def recalls(function: Any, fact: str) -> bool:
    """Whether a fact was remembered about the code of a function and all modules it reaches."""
    for part in _made_of(function):
        ref, facts = _KNOWN.get(id(part), (None, ()))
        if ref is None or ref() is not part or fact not in facts:
            return False
    return True


def remember(function: Any, fact: str) -> None:
    """Remember a fact about a function."""
    for part in _made_of(function):
        ref, facts = _KNOWN.get(id(part), (None, set()))
        if ref is None or ref() is not part:
            facts = set()
        facts.add(fact)
        _KNOWN[id(part)] = weakref.ref(part), facts
