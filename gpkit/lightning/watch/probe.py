"""What a training step shows of a net: the input and output of a submodule, and activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.compiler import set_stance
from torch.utils.hooks import RemovableHandle

from gpkit.autodiff.compat import in_backward, is_compiled, is_compiled_function
from gpkit.autodiff.kernels import double_backward


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a net while it runs.

    Args:
        order: of the derivatives that its kernels must have; 0 where none is taken twice.
        x: whether its input is wanted.
        output: whether its output is wanted.
        activations: names of submodules whose outputs are wanted.
        moves: whether it may be run again at another input or activation.
    """

    order: int = 0
    x: bool = False
    output: bool = False
    activations: tuple[str, ...] = ()
    moves: bool = False

    @property
    def eager(self) -> bool:
        """Whether a compiled net has to run uncompiled: it has no hooks and no double backward."""
        return self.order > 0 or self.x or self.output or bool(self.activations)


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


class watched:
    """Watch a net while it runs, on kernels with the derivatives needed.

    An input that has no graph is replaced by a leaf that requires grad, and so is an activation;
    the tensors of the batch stay as they are. What the net gets is a copy, so that an operation in
    place does not change what was seen. Of several calls the last is seen.

    No hook is left behind, unless they are put on to stay, with `keep`: then they see nothing
    outside of the context, which can be entered again and again. Where checkpointing runs the net
    again, in the backward pass of what was seen, they do as they did.

    Args:
        net: what is watched.
        title: how a problem calls it.
        wanted: of its input, output and activations.
        moved: other values to compute with: of the input under the name "", of activations.
        eager: whether compiled modules run uncompiled, as hooks and a double backward ask for.
    """

    def __init__(
        self,
        net: nn.Module,
        title: str,
        wanted: Wanted,
        moved: Mapping[str, Tensor] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        self.net, self.title, self.wanted, self.moved = net, title, wanted, moved or {}
        self.eager = eager
        self.kernels = double_backward(wanted.order) if wanted.order else None
        self.kept = False
        self.hooks: list[RemovableHandle] = []
        self.seen: Seen | None = None
        self.last = False  # whether the last forward of the net was seen

    def keep(self) -> watched:
        """Put the hooks on to stay, until `remove`: each context then costs less."""
        self._put_on()
        self.kept = True
        return self

    def remove(self) -> None:
        """Take the hooks off."""
        while self.hooks:
            self.hooks.pop().remove()

    def __enter__(self) -> Seen:
        """Return what is seen, complete when the block ends."""
        if not self.kept:
            self._put_on()
        self.eagerly = set_stance("force_eager") if self.eager else None
        if self.kernels is not None:
            self.kernels.__enter__()
        self.seen = seen = Seen()
        self.last = True
        return seen

    def __exit__(self, *exception: object) -> None:
        """See no more."""
        self.seen = None
        if self.kernels is not None:
            self.kernels.__exit__(*exception)
        if self.eagerly is not None:
            self.eagerly.__exit__(*exception)
        if not self.kept:
            self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """Be one that never sees, in a copy of the net: hooks are copied with it."""
        return watched, (nn.Identity(), self.title, Wanted())

    def _put_on(self) -> None:
        wanted, net = self.wanted, self.net
        named = [(name, net.get_submodule(name)) for name in wanted.activations]
        if wanted.x:
            self.hooks.append(net.register_forward_pre_hook(self._enter, with_kwargs=True))
        if wanted.output:
            self.hooks.append(net.register_forward_hook(self._leave))
        for name, module in named:
            self.hooks.append(module.register_forward_hook(partial(self._catch, name)))

    def _in_use(self) -> Seen | None:
        """Return where what a hook sees is noted: what is made again for a backward, in vain.

        Raises:
            RuntimeError: if what is made again may have been made at another input or activation.
        """
        if not in_backward():
            self.last = self.seen is not None
            return self.seen
        if not self.last:
            return None
        if self.wanted.moves:
            raise RuntimeError(
                f"{self.title} runs under checkpointing, and a penalty moves what it computes with:"
                " the forward that is made again would be another. Use estimator='exact' at the "
                "data, or no checkpointing there"
            )
        return Seen()

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        seen = self._in_use()
        if seen is None:
            return None
        seen.calls[""] = seen.calls.get("", 0) + 1
        where, x = (0, args[0]) if args else (None, None)
        if not isinstance(x, Tensor):
            places = [*enumerate(args), *kwargs.items()]
            where, x = next(((k, v) for k, v in places if isinstance(v, Tensor)), (None, None))
        if x is None or not x.is_floating_point():
            found = "no tensor" if x is None else f"{x.dtype}"
            seen.problems.append(
                f"{self.title} is given {found}, which has no gradient: name a submodule that is "
                "given floating-point numbers, as what follows an embedding"
            )
            return args, kwargs
        seen.x = moved = self._moved("", x)
        if isinstance(where, int):
            args = (*args[:where], moved.clone(), *args[where + 1 :])
        else:
            kwargs = {**kwargs, where: moved.clone()}
        return args, kwargs

    def _leave(self, _: nn.Module, args: Any, output: Any) -> None:
        if self.seen is not None and not in_backward():
            self.seen.output = output

    def _catch(self, name: str, module: nn.Module, _: Any, output: Any) -> Any:
        seen = self._in_use()
        if seen is None:
            return None
        seen.calls[name] = seen.calls.get(name, 0) + 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
            seen.problems.append(
                f"activation({name!r}) is {found}, and must be a floating-point tensor: name a "
                f"submodule within that {type(module).__name__}"
            )
            return output
        seen.activations[name] = moved = self._moved(name, output)
        return moved.clone()

    def _moved(self, name: str, x: Tensor) -> Tensor:
        """Return the value to compute with in place of ``x``: with a graph, or as a leaf."""
        if name in self.moved:
            return self.moved[name]
        return x if x.requires_grad else x.detach().requires_grad_()


def runs_compiled(module: nn.Module) -> bool:
    """Whether torch.compile stands behind a LightningModule's step, or behind a part of it."""
    step = getattr(module, "training_step", None)
    return any(map(is_compiled, module.modules())) or is_compiled_function(step)
