"""What a training step shows of a net: the input and output of a submodule, and activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Needs:
    """What penalties need of a training step, all together.

    Args:
        order: the highest order of those that are differentiated twice; 0 where none is.
        x: whether the net's input is differentiated in.
        output: whether the net's output is differentiated.
        activations: names of submodules.
        state: whether the step may be run again, with the same random numbers.
        pooled: the names of those whose gradient is averaged over micro-batches or ranks.
        differing: of those that take the gradient of the loss at two points.
    """

    order: int = 0
    x: bool = False
    output: bool = False
    activations: tuple[str, ...] = ()
    state: bool = False
    pooled: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()

    @property
    def watch(self) -> bool:
        """Whether the net has to be watched."""
        return self.x or self.output or bool(self.activations)


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


class watched:  # noqa: N801  a context: with watched(net, ...) as seen
    """Watch a net while it runs. No hook is left behind.

    An input that has no graph is replaced by a leaf that requires grad, and so is an activation;
    the tensors of the batch stay as they are. What the net gets is a copy, so that an operation in
    place does not change what was seen. Of several calls the last is seen.

    Args:
        net: what is watched.
        title: how a problem calls it.
        needs: whether its input and its output are needed, and which activations.
        moved: other values to compute with: of the input under the name "", of activations.
    """

    def __init__(
        self, net: nn.Module, title: str, needs: Needs, moved: Mapping[str, Tensor] | None = None
    ) -> None:
        self.net, self.title, self.needs, self.moved = net, title, needs, moved or {}

    def __enter__(self) -> Seen:
        """Return what is seen, complete when the block ends."""
        seen, net, moved = Seen(), self.net, self.moved
        self.hooks: list[RemovableHandle] = []
        if self.needs.x:
            enter = partial(_enter, seen, self.title, moved.get(""))
            self.hooks.append(net.register_forward_pre_hook(enter, with_kwargs=True))
        if self.needs.output:
            self.hooks.append(net.register_forward_hook(partial(_leave, seen)))
        for name in self.needs.activations:
            catch = partial(_catch, seen, name, moved.get(name))
            self.hooks.append(net.get_submodule(name).register_forward_hook(catch))
        return seen

    def __exit__(self, *exception: object) -> None:
        """Take the hooks back."""
        for hook in self.hooks:
            hook.remove()


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
