"""Which module of a net does what, in a forward pass: makes a node, writes to its input, draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import is_compiled, nodes_made, tree_leaves, write_count
from gpkit.findings.compat import has_values, made_at

ROOT = "(the net itself)"
OUTSIDE = "(outside of the net, such as the loss)"


class Seen(NamedTuple):
    """Tensors, as a number for each by which two are told apart, and whether they are finite."""

    numbers: tuple[float, ...]
    finite: bool


@dataclass
class Visit:
    """One call of a module.

    Args:
        name: of the module in the net.
        kind: its class.
        first: how many nodes its thread had made before.
        last: how many it had made after.
        given: what it got.
        returned: what it returned.
        wrote: whether it wrote to what it got.
        tracked: whether it ran with gradients on.
    """

    name: str
    kind: str
    first: int
    last: int
    given: Seen
    returned: Seen
    wrote: bool
    tracked: bool


class Watch:
    """A context that notes the calls of a net's modules, in the order in which they end.

    What is inside of a compiled module is not watched: a hook would compile it again.

    Args:
        net: the net.
        values: whether to look at the values of tensors as well.
    """

    def __init__(self, net: nn.Module, *, values: bool = True) -> None:
        self.visits: list[Visit] = []
        self.watched = _watched(net, "")
        # By identity: the hash of a metric changes with its state.
        self.names = {id(module): name for module, name in self.watched}
        self.values = values
        self.outputs: list[Tensor] = []  # of the outermost calls, with their graphs
        self.running: list[tuple[nn.Module, int, list[tuple[Tensor, int]], Seen]] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Watch:
        for module, _ in self.watched:
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self.handles:
            self.handles.pop().remove()
        self.running.clear()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [(t, write_count(t)) for t in _tensors((args, kwargs)) if not t.is_inference()]
        self.running.append((module, nodes_made(), given, self._seen((args, kwargs))))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entered, first, given, got = self.running.pop()
        while entered is not module:  # of a call that raised an error that the net caught
            entered, first, given, got = self.running.pop()
        if not self.running:
            self.outputs += [t for t in _tensors(output) if t.requires_grad]
        wrote = any(write_count(t) != before for t, before in given)
        name, kind, returned = self.names[id(module)], type(module).__name__, self._seen(output)
        on = torch.is_grad_enabled()
        self.visits.append(Visit(name, kind, first, nodes_made(), got, returned, wrote, on))

    def _seen(self, values: Any) -> Seen:
        if not self.values:
            return Seen((), True)
        tensors = _tensors(values)
        return Seen(tuple(map(_number, tensors)), all(map(_finite, tensors)))

    def name_of(self, node: Any) -> str:
        """Return the name of the innermost module whose forward pass made a node."""
        number = made_at(node)
        around = [v for v in self.visits if v.first <= number < v.last]
        if not around:
            scripted = isinstance(self.watched[0][0], torch.jit.ScriptModule)
            return ROOT if scripted else OUTSIDE
        return min(around, key=lambda v: v.last - v.first).name or ROOT


def _watched(module: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Return a module and what is in it, each once, with names; not what is compiled."""
    found = {id(module): (module, name)}
    if not is_compiled(module) and not isinstance(module, torch.jit.ScriptModule):
        for own, child in module.named_children():
            for part, inner in _watched(child, f"{name}.{own}" if name else own):
                found.setdefault(id(part), (part, inner))
    return list(found.values())


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _number(tensor: Tensor) -> float:
    """Return a number by which two tensors are told apart."""
    flat = tensor.detach().flatten()
    if not flat.numel() or not has_values(flat):
        return 0.0
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    weights = torch.linspace(1, 2, flat.numel(), dtype=torch.float64, device=flat.device)
    return float(flat.double().nan_to_num() @ weights)


def _finite(tensor: Tensor) -> bool:
    known = tensor.is_floating_point() and has_values(tensor)
    return not known or bool(tensor.detach().isfinite().all())
