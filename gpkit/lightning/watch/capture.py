"""What hooks capture of a training step, and what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.layers.recording import Recording
from gpkit.lightning.batches import repeated
from gpkit.lightning.watch.entries import Path


@dataclass(frozen=True)
class ProbeSpec:
    """What a `Probe` captures, and what the forward pass has to support.

    Args:
        order: highest order k of a derivative that a penalty takes by double backward: the forward
            runs on kernels that can be differentiated so often. 0 if every graph is differentiated
            once.
        x: whether to capture the input of the net.
        output: whether to capture its output.
        activations: names of submodules whose outputs are captured.
        moves: whether a penalty reruns the net at another input or activation.
        entries: the names of inputs that are captured.
    """

    order: int = 0
    x: bool = False
    output: bool = False
    activations: tuple[str, ...] = ()
    moves: bool = False
    entries: tuple[str, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The submodules whose calls are captured: "" is the net itself, then the activations."""
        return (*[""] * (self.x or self.output), *self.activations)

    @property
    def eager(self) -> bool:
        """Whether a compiled net must run uncompiled: it has no hooks and no double backward."""
        captures = self.x or self.output or self.activations or self.entries
        return self.order > 0 or bool(captures)


@dataclass
class Capture:
    """What a `Probe` captured in one training step.

    Args:
        x: the first tensor in the input of the net, ``[B, *S]``. It requires grad.
        output: the output of the net.
        activations: outputs of submodules by name, ``[B, *H]`` each. They require grad.
        calls: the shape of the tensor in each call, by submodule name; the net itself is "".
        problems: messages about inputs and activations that cannot be differentiated, by name.
        arguments: the arguments of the net, and the position or name of ``x`` in them.
        earlier: the number of calls before the last backward pass, under manual optimisation.
        layers: the calls of wide layers, where a penalty in the weights can use them; or None.
        entries: inputs by name, ``[B, *S]`` each. They require grad.
        paths: where the arguments of the net have them.
        of_call: the names of those that are arguments of the net; the others are of the batch.
        of_batch: copies of the entries that the batch has, which the step was given.
        batch_paths: where the batch has them.
        losses: the loss of each sample ``[B]`` or step ``[B, T]``; None if the step shows none.
    """

    x: Tensor | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any], int | str] = ((), {}, 0)
    earlier: dict[str, int] = field(default_factory=dict)

    entries: dict[str, Tensor] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    of_call: set[str] = field(default_factory=set)
    of_batch: dict[str, Tensor] = field(default_factory=dict)
    batch_paths: dict[str, Path] = field(default_factory=dict)
    losses: Tensor | None = None

    def count(self, name: str) -> int:
        """Return the number of calls of a submodule since the last backward pass of the step."""
        return len(self.calls.get(name, ())) - self.earlier.get(name, 0)

    def end_backward(self) -> None:
        """Note that a backward pass has ended: the calls so far belong to it."""
        self.earlier = {name: len(calls) for name, calls in self.calls.items()}

    output: Any = None
    activations: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, list[list[int]]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    layers: Recording | None = None

    def net_at(self, net: nn.Module) -> Callable[[Tensor], Any]:
        """Return the net as a function of ``x`` alone, with the other arguments of this step."""
        args, kwargs, where = self.arguments
        return net if len(args) + len(kwargs) == 1 else partial(_call, net, args, kwargs, where)

    def names(self, spec: ProbeSpec) -> tuple[str, ...]:
        """The submodules whose calls were captured."""
        return spec.names if "" in spec.names or not self.of_call else ("", *spec.names)

    def is_clear(self, spec: ProbeSpec, call: int | None) -> bool:
        """Whether each submodule was called once, or often enough for the chosen call."""
        names = self.names(spec)
        if self.entries.keys() != set(spec.entries):
            return False
        if call is None:
            return all(self.count(name) == 1 for name in names)
        counts = [len(self.calls.get(name, ())) for name in names]
        # A module that is called once has no other call than that.
        return all(n == 1 or n > call for n in counts) and max(counts, default=call + 1) > call


def with_argument(args: Any, kwargs: Any, where: Any, x: Tensor) -> tuple[Any, Any]:
    """Return arguments with another tensor at a position or under a name."""
    if isinstance(where, int):
        return (*args[:where], x, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: x}


def _call(net: nn.Module, args: Any, kwargs: Any, where: Any, x: Tensor) -> Any:
    here = args[where] if isinstance(where, int) else kwargs[where]
    others = repeated((args, kwargs), len(here), len(x))
    args, kwargs = with_argument(others[0], others[1], where, x)
    return net(*args, **kwargs)
