"""Record the calls of a net's layers in a forward pass: inputs, and places in the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gpkit.autodiff.compat import hooks_of, write_count
from gpkit.autodiff.derivatives import gradients_at
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.autodiff.tracing.hooks import hooked

Gradients = Callable[[Tensor, Sequence[Any]], tuple[Tensor | None, ...]]


@dataclass(eq=False)
class LayerCall:
    """One call of a layer.

    Args:
        layer: the module, or what has its weight.
        a: its input.
        z: the edge of its output in the graph. An in-place operation on the output, such as
            ``ReLU(inplace=True)``, does not change it. In a compiled loss the output itself, and
            the net goes on with a copy.
        version: the number of in-place writes to ``a`` before the call.
        dtype: of its output, which autocast may have changed.
        delta: δ, the gradient of the loss in the output, when it was taken.
        joins: whether g is taken with δ.
        g: the gradient in ``a``, if it was taken.
        straight: whether δ came to the layer as it was taken: torch takes it before the hooks on
            the output, and the layer has it after them. None if that was not seen.
    """

    layer: Any
    a: Tensor
    z: GradientEdge | Tensor
    version: int
    dtype: torch.dtype
    delta: Tensor | None = None
    joins: bool = False
    g: Tensor | None = None
    straight: bool | None = None

    @property
    def intact(self) -> bool:
        """Whether ``a`` still holds the values of the call."""
        return bool(TRACES) or write_count(self.a) == self.version


@dataclass(eq=False)
class Recording:
    """The calls of the layers of a net in one forward pass.

    Args:
        net: the module; None if the calls were read from a graph.
        calls: in the order of the forward pass.
        missing: names of layers that were called with other arguments than one tensor.
    """

    net: Any
    calls: list[LayerCall] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def only(self, places: Sequence[int]) -> Recording:
        """Return a recording of some of the calls."""
        return Recording(self.net, [self.calls[i] for i in places])

    def differentiate(
        self, y: Tensor, others: Sequence[Tensor] = (), by: Gradients = gradients_at
    ) -> tuple[Tensor | None, ...]:
        """Take δ of each call, the gradient of a number or of a sum, and g of those that join.

        Args:
            y: the number, or numbers.
            others: further variables.
            by: what takes the gradients.

        Returns:
            The gradients in the others, differentiable; None if unused.
        """
        inner = [call for call in self.calls if call.joins]
        if inner:  # the gradient in a leaf, such as learned queries, may be one of the others
            own = {*map(id, others)}
            inner = [c for c in inner if c.a.grad_fn is not None or id(c.a) in own]
        ends = [*(call.z for call in self.calls), *(call.a for call in inner), *others]
        found = by(y, ends)
        for call, delta in zip(self.calls, found, strict=False):
            call.delta = delta
        for call, g in zip(inner, found[len(self.calls) :], strict=False):
            call.g = g
        return found[len(self.calls) + len(inner) :]


class recorded_layers:
    """A context that records the calls of the layers of a net that own parameters.

    Args:
        net: the module.
        only: which of those layers to record, from a function of the layer; None is all.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> with recorded_layers(net) as recording:
    ...     _ = net(torch.ones(4, 2))
    >>> [list(call.a.shape) for call in recording.calls]
    [[4, 2], [4, 3]]
    """

    def __init__(self, net: nn.Module, only: Callable[[nn.Module], bool] | None = None) -> None:
        self.net = net
        self.only = only

    def __enter__(self) -> Recording:
        self.recording = Recording(self.net)
        layers = [
            module
            for module in self.net.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
            and (self.only is None or self.only(module))
        ]
        if RECORDS:  # in a graph the user's hooks come first, and may change the output
            layers = [layer for layer in layers if not hooks_of(layer)[0]]
        self.hooks = [hooked(m, self._record, with_kwargs=True, first=True) for m in layers]
        return self.recording

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _record(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not all(isinstance(t, Tensor) for t in (*given, output)):
            self.recording.missing.append(type(layer).__name__)
        elif output.requires_grad:
            a = given[0]
            if TRACES:  # the eager step has looked at what is written in place
                self.recording.calls.append(LayerCall(layer, a, output, 0, output.dtype))
                return output.clone()
            call = LayerCall(layer, a, get_gradient_edge(output), write_count(a), output.dtype)
            self.recording.calls.append(call)
        return None
