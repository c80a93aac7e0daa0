"""What a forward pass starts from and leaves behind: buffers, attributes and random numbers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkit.autodiff.compat import buffers_of, is_compiled, tree_leaves
from gpkit.autodiff.random import (
    RandomState,
    bookmark,
    is_generator,
    position,
    random_state,
    reseed,
    set_random_state,
    shared,
)
from gpkit.autodiff.reached import (
    NO_OTHERS,
    TORCH_ALONE,
    Reach,
    family_of,
    own_attributes,
    reach,
)

CONTAINERS = (list, dict, set, deque)


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
    found = reach(function)
    if found.is_plain:
        return Start(random_state(device), [], {})
    streams = streams_of(found)
    own = dict(found.attributes)
    kept = {
        owner: (
            {name: copied(buffer) for name, buffer in buffers_of(owner).items()},
            {name: copied(value) for name, value in own.get(owner, {}).items()},
        )
        for owner in found.family
    }
    streams += () if TORCH_ALONE in found.known.facts else shared()
    return Start(random_state(device), [bookmark(s) for s in streams], kept)


def put_back(found: Reach, start: Start, device: torch.device) -> None:
    """Put buffers, attributes and random numbers back to what a run of a function started from."""
    set_random_state(start.torch, device)
    for again in start.streams:
        again()
    for owner in found.family:
        buffers, attributes = start.modules[owner]
        for name, buffer in buffers_of(owner).items():
            if buffer is not None and buffers.get(name) is not None:
                buffer.data.copy_(buffers[name])
        vars(owner).update(attributes)


def streams_of(found: Reach) -> list[Any]:
    """Return the generators that a function refers to, and those of the modules that it runs."""
    of_modules = [v for _, own in found.attributes for v in own.values() if is_generator(v)]
    return [*found.streams, *of_modules]


@contextmanager
def own_streams(found: Reach, seed: int | Start) -> Iterator[None]:
    """Let a function draw from a seed, or as from a start; then put its streams back.

    These are the generators that it refers to, and the streams of Python and NumPy: not torch's.
    The latter two are left out if its code names neither, and its first run did not move them.
    """
    streams = streams_of(found)
    new = TORCH_ALONE not in found.known.facts
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
        if new and not found.known.may_draw and before == [position(s) for s in shared()]:
            found.known.facts.add(TORCH_ALONE)
    finally:
        for put_back in back:
            put_back()


@contextmanager
def own_state(
    found: Reach, start: Start | None = None, *, evaluating: bool = False, meets: bool = True
) -> Iterator[None]:
    """Let modules write to copies of their buffers and attributes; put the originals back.

    The original tensors are put back, and never written to, because graphs may have saved them.
    Modules that the function refers to get copies before it runs, and get their originals back even
    if the forward pass replaced a buffer. A global hook finds other modules when they are called.
    Such a hook slows every module down, so it is left out once a run has called no others, until
    something changes, unless a module holds others; and it looks again now and then. torch.compile
    would trace it, so it is left out as well if the function refers to a compiled module.

    Args:
        found: the modules that the function refers to.
        start: what the copies are of; None is the present state.
        evaluating: whether the modules are put in eval mode meanwhile.
        meets: whether it looks for other modules.

    Yields:
        Nothing.
    """
    trained: list[nn.Module] = []
    swapped: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    attributes: list[tuple[nn.Module, dict[str, Any]]] = []
    seen: set[nn.Module] = set()

    def swap(owners: list[nn.Module], own: list[tuple[nn.Module, dict[str, Any]]]) -> None:
        for owner in owners:
            buffers = buffers_of(owner)
            if evaluating and owner.training:
                trained.append(owner)
                owner.training = False
            for name, buffer in list(buffers.items()) if buffers else ():
                if buffer is not None:
                    then = start.modules.get(owner) if start else None
                    copy = copied(buffer if then is None else then[0].get(name, buffer))
                    swapped.append((owner, name, buffer, copy))
                    put(owner, name, copy)
        for owner, now in own:
            then = start.modules.get(owner) if start else None
            attributes.append((owner, now))
            vars(owner).update({k: copied(v) for k, v in (then[1] if then else now).items()})

    def meet(module: nn.Module, _: Any) -> None:
        if module not in seen:
            owners = [owner for owner in family_of([module]) if owner not in seen]
            seen.update(owners)
            found.known.facts.discard(NO_OTHERS)
            swap(owners, [(owner, own) for owner in owners if (own := own_attributes(owner))])

    hook = None
    looks = meets and (NO_OTHERS not in found.known.facts or found.looks)
    if looks and not any(map(is_compiled, found.family)):
        seen.update(found.family)
        hook = register_module_forward_pre_hook(meet)
    try:
        swap(found.family, found.attributes)
        known = len(swapped)
        yield
        met = len(seen) > len(found.family)
        if hook is not None and not (met or found.known.may_meet):
            found.known.facts.add(NO_OTHERS)
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
            restore(module, own)


def restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Put back the attributes of the user's own in a module: all of them, and no others."""
    for name in own_attributes(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)


def put(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Replace a buffer of a module."""
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, buffer)  # they are in C++
    else:
        buffers_of(module)[name] = buffer


def copied(value: Any) -> Any:
    """Return a copy of a tensor without a graph, or of a list, dict or set; else the value."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    return type(value)(value) if type(value) in CONTAINERS else value


def copied_net(net: nn.Module) -> nn.Module:
    """Return a copy of a net, with leaf parameters of its own.

    `copy.deepcopy` refuses a net that holds a tensor with a graph, such as a hidden state or the
    weight of `torch.nn.utils.weight_norm`; the parameters of a copied scripted module are no
    leaves.
    """
    held: dict[int, Any] = {}
    for module in net.modules():
        for value in tree_leaves(list(vars(module).values())):
            if isinstance(value, Tensor) and not value.is_leaf:
                held[id(value)] = value.detach().clone()
    with torch.no_grad():
        made = copy.deepcopy(net, held)
    for p, own in zip(net.parameters(), made.parameters(), strict=True):
        if own.requires_grad != p.requires_grad:
            own.requires_grad_(p.requires_grad)
    return made


def in_double(net: nn.Module) -> nn.Module:
    """Return a copy of a net in float64 and complex128."""
    made = copied_net(net).double()
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_complex():
                tensor.data = tensor.data.to(torch.complex128)
    return made
