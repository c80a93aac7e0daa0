"""What a training step shows of a net: the input and output of a submodule, and activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass
class Seen:
    """What was seen.

    Args:
        x: the input of the net, its first tensor, ``[B, *S]``: what the net was computed from.
        output: what the net gave.
        activations: the outputs of submodules, by name.
        calls: how often each was called, by name; the net's own is "".
        problems: what could not be differentiated, in words.
    """

    x: Tensor | None = None
    output: Any = None
    activations: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@contextmanager
def watched(
    net: nn.Module,
    title: str,
    *,
    x: bool = False,
    output: bool = False,
    activations: Iterable[str] = (),
    moved: Mapping[str, Tensor] | None = None,
) -> Iterator[Seen]:
    """Watch a net while it runs. No hook is left behind.

    An input that has no graph is replaced by a leaf that requires grad, and so is an activation;
    the tensors of the batch stay as they are. What the net gets is a copy, so that an operation in
    place does not change what was seen. Of several calls the last is seen.

    Args:
        net: what is watched.
        title: how a problem calls it.
        x: whether its input is to be differentiated in.
        output: whether its output is asked for.
        activations: names of its submodules.
        moved: other values to compute with: of the input under the name "", of activations.

    Yields:
        What was seen, complete when the block ends.
    """
    seen, moved = Seen(), moved or {}
    with ExitStack() as stack:
        if x or "" in moved:
            enter = partial(_enter, seen, title, moved.get(""))
            hook = net.register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(hook.remove)
        if output:
            stack.callback(net.register_forward_hook(partial(_leave, seen)).remove)
        for name in activations:
            catch = partial(_catch, seen, name, moved.get(name))
            stack.callback(net.get_submodule(name).register_forward_hook(catch).remove)
        yield seen


def _enter(
    seen: Seen, title: str, moved: Tensor | None, _: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    seen.calls[""] = seen.calls.get("", 0) + 1
    places = [*enumerate(args), *kwargs.items()]
    where, x = next(((k, v) for k, v in places if isinstance(v, Tensor)), (None, None))
    if x is None or not x.is_floating_point():
        found = "no tensor" if x is None else f"{x.dtype}"
        seen.problems.append(
            f"{title} is given {found}, which has no gradient: name a submodule that is given "
            "floating-point numbers, as what follows an embedding"
        )
        return args, kwargs
    if moved is None:
        moved = x if x.requires_grad else x.detach().requires_grad_()
    seen.x = moved
    if isinstance(where, int):
        args = (*args[:where], moved.clone(), *args[where + 1 :])
    else:
        kwargs = {**kwargs, where: moved.clone()}
    return args, kwargs


def _leave(seen: Seen, _: nn.Module, args: Any, output: Any) -> None:
    seen.output = output


def _catch(
    seen: Seen, name: str, moved: Tensor | None, module: nn.Module, _: Any, output: Any
) -> Any:
    seen.calls[name] = seen.calls.get(name, 0) + 1
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
        seen.problems.append(
            f"activation({name!r}) is {found}, and must be a floating-point tensor: name a "
            f"submodule within that {type(module).__name__}"
        )
        return output
    if moved is None:
        moved = output if output.requires_grad else output.detach().requires_grad_()
    seen.activations[name] = moved
    return moved.clone()
