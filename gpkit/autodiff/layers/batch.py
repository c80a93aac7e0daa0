"""The norm of a batch's gradient in the weights, by Gram matrices in wide linear layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import gradients_at
from gpkit.autodiff.layers.gram import gram_is_cheaper, gram_product, may_pay
from gpkit.autodiff.layers.places import Matrix
from gpkit.autodiff.layers.recording import Gradients, LayerCall, Recording
from gpkit.autodiff.numerics import squared_length
from gpkit.autodiff.tracing.calls import TRACES, noted


def may_be_wide(layer: nn.Module) -> bool:
    """Whether Gram matrices may pay in a layer: linear and wide."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    return may_pay(*layer.weight.shape)


def batch_norm(loss: Tensor, parameters: Sequence[Tensor], recording: Recording) -> Tensor:
    r"""Return ‖∂L/∂θ‖² for the loss of a batch.

    .. math:: \|\partial L / \partial W\|^2 = \sum_{i,j} (a_i \cdot a_j)(\delta_i \cdot \delta_j)

    in a linear layer with inputs a_i and gradients δ_i of its outputs, if it is wide compared with
    the batch. Other parameters have their gradient computed.

    Args:
        loss: L, one number.
        parameters: θ.
        recording: of the forward pass.

    Returns:
        n² ``[1]``, differentiable, in float32 or better.
    """
    wide = recording.only(noted(partial(wide_calls, loss, parameters, recording)))
    if TRACES:  # the eager step has looked at hooks
        return norm_of(loss, parameters, wide)
    with Watch(recording.calls) as watch:
        n2 = norm_of(loss, parameters, wide, watch.gradients)
    straight = [call for call in wide.calls if call.straight is not False]
    if len(straight) < len(wide.calls):
        return norm_of(loss, parameters, Recording(recording.net, straight))
    return n2


class Watch:
    """A context that sees whether δ comes to layers as it is taken, see `LayerCall.straight`.

    Args:
        calls: of the layers.
    """

    def __init__(self, calls: Sequence[LayerCall]) -> None:
        self.calls = calls
        self.came: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        edges: list[Any] = [call.z for call in self.calls]
        self.handles = [
            z.node.register_prehook(partial(self._note, i, z.output_nr))
            for i, z in enumerate(edges)
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, i: int, output: int, grads: Sequence[Tensor | None]) -> None:
        self.came[i] = grads[output]

    def gradients(self, y: Tensor, edges: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """Return the gradients at edges, as `gradients_at`, and note which calls are straight."""
        found = gradients_at(y, [*edges, *(call.z for call in self.calls)])
        for i, (call, delta) in enumerate(zip(self.calls, found[len(edges) :], strict=True)):
            call.straight = self.came[i] is delta if i in self.came else None
        return found[: len(edges)]


def norm_of(
    loss: Tensor, parameters: Sequence[Tensor], wide: Recording, by: Gradients = gradients_at
) -> Tensor:
    """Return the same for a recording of calls in which Gram matrices are right, and pay.

    Args:
        loss: L, one number.
        parameters: θ.
        wide: the recording.
        by: what takes the gradients.

    Returns:
        n² ``[1]``, differentiable, in float32 or better.
    """
    covered = {id(call.layer.weight) for call in wide.calls}
    grads = wide.differentiate(loss, [p for p in parameters if id(p) not in covered], by)
    found = tuple(g for g in grads if g is not None)
    total = squared_length(found) if found else loss.new_zeros(1)
    for call in wide.calls:
        if call.delta is not None:
            pair = call.delta, call.a
            left, right = (t if t.ndim == 2 else t.flatten(0, -2) for t in pair)
            total = total + gram_product(left, right)
    return total


def wide_calls(loss: Tensor, parameters: Sequence[Tensor], recording: Recording) -> list[int]:
    """Return the places of the calls of linear layers in which Gram matrices are right, and pay."""
    if torch.is_autocast_enabled(loss.device.type):
        return []  # the products of the forward pass are in half precision, these would not be
    wanted = {id(p) for p in parameters}
    calls = [c for c in recording.calls if is_wide(c.layer) and id(c.layer.weight) in wanted]
    calls = [
        c for c in calls if c.a.ndim > 1 and not c.a.is_complex() and c.intact and gram_pays(c)
    ]
    calls = [c for c in calls if c.dtype == c.a.dtype == c.layer.weight.dtype]  # no autocast there
    if not calls:
        return []
    recorded = Counter(id(c.layer.weight) for c in calls)
    used = graph.uses(loss)
    # A layer that runs twice has products between its calls as well: its gradient is cheaper.
    chosen = [c for c in calls if recorded[id(c.layer.weight)] == used[id(c.layer.weight)] == 1]
    return [i for i, call in enumerate(recording.calls) if call in chosen]


def is_wide(layer: Any) -> bool:
    """Whether Gram matrices may pay in what was recorded."""
    return isinstance(layer, Matrix) or may_be_wide(layer)


def gram_pays(call: LayerCall) -> bool:
    """Whether Gram matrices cost less than the gradient in a call of a linear layer."""
    p, q = call.layer.weight.shape
    return gram_is_cheaper(1, call.a.numel() // q, p, q)
