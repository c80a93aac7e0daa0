"""The gradient in the weights of wide linear layers, by one product for each layer.

A penalty on gradients uses a weight W twice: z = a Wᵀ in the forward pass, and g = δ W in the
backward pass. So its own gradient has two parts, ẑᵀ a + δᵀ ĝ with ẑ = ∂T/∂z and ĝ = ∂T/∂g. Autograd
takes two products, each of the size of W, and a sum. One product of stacked rows is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import keeps_graph
from gpkit.autodiff.layers.places import Matrix
from gpkit.autodiff.layers.recording import LayerCall
from gpkit.autodiff.numerics import without_autocast
from gpkit.shortcut.compat import RUN, applied

LARGE = 2**18  # entries of a weight; below, the products cost less than what is around them


def joining(calls: Sequence[LayerCall], variables: Collection[int]) -> None:
    """Note which calls join their products: of a wide linear layer, used once, on a few rows.

    Args:
        calls: of layers.
        variables: the ids of the parameters that are known to be used in these calls alone.
    """
    wide = []
    for call in calls:
        layer, a = call.layer, call.a
        linear = type(layer) is nn.Linear or type(layer) is Matrix
        if linear and a.ndim == 2 and id(layer.weight) in variables:
            p, q = layer.weight.shape
            if p * q >= LARGE and a.shape[0] * (p + q) < p * q:
                wide.append(call)
    uses = Counter([id(call.layer.weight) for call in calls]) if wide else {}
    for call in wide:
        call.joins = uses[id(call.layer.weight)] == 1


def in_one_product(total: Tensor, calls: Sequence[LayerCall], leaves: Sequence[Tensor]) -> Tensor:
    """Return a number whose backward pass takes one product for each weight of calls that join.

    A backward pass with ``create_graph=True`` goes through the graph of the number itself.

    Args:
        total: T, a number with a graph.
        calls: the calls of layers; T uses the weights of those that join in these calls and their
            backward passes alone.
        leaves: of the graph of T.
    """
    joined = [call for call in calls if call.joins]
    if not joined:
        return total
    weights = [call.layer.weight for call in joined]
    own = {*map(id, weights)}
    others = [leaf for leaf in leaves if id(leaf) not in own]
    return applied(_OneProduct, Held(total, joined, others), *weights, *others)


class Held:
    """What the backward pass needs, until it has run."""

    def __init__(self, total: Tensor, calls: list[LayerCall], others: list[Tensor]) -> None:
        self.total: Tensor | None = total
        self.calls, self.others = calls, others


class _OneProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Held, *_: Tensor) -> Tensor:
        ctx.held = held
        assert held.total is not None
        return held.total.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        held: Held = ctx.held
        total, calls, others = held.total, held.calls, held.others
        if total is None:
            raise RuntimeError(
                "the graph of the loss and its penalty was freed by the first backward pass: give "
                "that one retain_graph=True"
            )
        if torch.is_grad_enabled():  # create_graph=True
            xs = [*(call.layer.weight for call in calls), *others]
            return None, *torch.autograd.grad(total, xs, grad, create_graph=True, allow_unused=True)
        keep = keeps_graph()
        if not keep:
            held.total, held.calls = None, []
        behind = [call.g for call in calls if call.g is not None]
        ends: Any = (*(call.z for call in calls), *behind, *others)
        with without_autocast(total):
            found = RUN((total,), (grad,), keep, False, ends, True, accumulate_grad=False)
        at_g = iter(found[len(calls) : len(calls) + len(behind)])
        products = [
            product(call, z, None if call.g is None else next(at_g))
            for call, z in zip(calls, found, strict=False)
        ]
        return None, *products, *found[len(calls) + len(behind) :]


def product(call: LayerCall, at_z: Tensor | None, at_g: Tensor | None) -> Tensor | None:
    """Return ẑᵀ a + δᵀ ĝ, without a graph; a part that is None is zero."""
    pairs = [(at_z, call.a), (call.delta, at_g)]
    found = [(left, right) for left, right in pairs if left is not None and right is not None]
    if not found:
        return None
    sides = [[t.flatten(0, -2) for t in side] for side in zip(*found, strict=True)]
    left, right = (side[0] if len(side) == 1 else torch.cat(side) for side in sides)
    return left.t() @ right
