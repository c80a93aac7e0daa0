"""The gradient in the weights of wide linear layers: two products, one added to the other.

A penalty on gradients uses a weight W twice: z = a Wᵀ in the forward pass, and g = δ W in the
backward pass. So its own gradient has two parts, ẑᵀ a + δᵀ ĝ with ẑ = ∂T/∂z and ĝ = ∂T/∂g. Autograd
takes two products, each of the size of W, and a sum. Here one is added to the other in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.autodiff.compat import keeps_graph
from gpkit.autodiff.derivatives import unhooked
from gpkit.autodiff.layers.places import Matrix, Place
from gpkit.autodiff.layers.recording import LayerCall
from gpkit.autodiff.numerics import without_autocast
from gpkit.shortcut.compat import RUN, applied

LARGE = 2**18  # entries of a weight; below, the products cost less than what is around them


def wide_places(places: Sequence[Place], variables: Collection[int]) -> list[tuple[int, int, int]]:
    """Return which places are of wide linear layers that are used once, and their p and q.

    Args:
        places: of the calls of layers.
        variables: the ids of the parameters that are known to be used in these calls alone.
    """
    layers = [place.layer() for place in places]
    uses = Counter([id(layer.weight) for layer in layers])
    found = []
    for i, layer in enumerate(layers):
        weight = layer.weight
        linear = type(layer) is nn.Linear or type(layer) is Matrix
        alone = id(weight) in variables and uses[id(weight)] == 1 and places[i].joins
        if linear and alone and weight.numel() >= LARGE:
            found.append((i, *weight.shape))
    return found


def note_joins(calls: Sequence[LayerCall], wide: Sequence[tuple[int, int, int]]) -> None:
    """Note which calls join their products: those at wide places with a few rows."""
    for i, p, q in wide:
        a = calls[i].a
        calls[i].joins = a.ndim == 2 and a.shape[0] * (p + q) < p * q


def with_summed_products(
    total: Tensor, calls: Sequence[LayerCall], leaves: Sequence[Tensor], parts: Sequence[Tensor]
) -> Tensor:
    """Return a number whose backward pass adds up the products in each weight of calls that join.

    A backward pass with ``create_graph=True`` goes through the graph of the number itself.

    Args:
        total: T, a number with a graph.
        calls: the calls of layers; the parts use the weights of those that join in these calls and
            their backward passes alone.
        leaves: of the graphs of the parts.
        parts: what T is made of, and maybe of other leaves, such as those of a form.
    """
    joined = [call for call in calls if call.joins]
    if not joined:
        return total
    weights = [call.layer.weight for call in joined]
    own = {*map(id, weights)}
    added = graph.leaves_outside(total, parts)
    if any(id(leaf) in own for leaf in added):
        return total
    others = [*{id(x): x for x in (*leaves, *added) if id(x) not in own}.values()]
    return applied(_SummedProducts, Held(total, joined, others), *weights, *others)


class Held:
    """What the backward pass needs, until it has run."""

    def __init__(self, total: Tensor, calls: list[LayerCall], others: list[Tensor]) -> None:
        self.total: Tensor | None = total
        self.calls, self.others = calls, others


class _SummedProducts(torch.autograd.Function):
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
            options: dict[str, Any] = {"create_graph": True, "allow_unused": True}
            with unhooked(xs):
                return None, *torch.autograd.grad(total, xs, grad, **options)
        keep = keeps_graph()
        if not keep:
            held.total, held.calls = None, []
        behind = [call.g for call in calls if call.g is not None]
        ends: Any = (*(call.z for call in calls), *behind, *others)
        with without_autocast(total), unhooked(others):
            # Other losses may share a part of the graph. What nobody else has goes with `held`.
            found = RUN((total,), (grad,), True, False, ends, True, accumulate_grad=False)
        at_g = iter(found[len(calls) : len(calls) + len(behind)])
        products = [
            product(call, z, None if call.g is None else next(at_g))
            for call, z in zip(calls, found, strict=False)
        ]
        return None, *products, *found[len(calls) + len(behind) :]


def product(call: LayerCall, at_z: Tensor | None, at_g: Tensor | None) -> Tensor | None:
    """Return ẑᵀ a + δᵀ ĝ, without a graph; a part that is None is zero."""
    found = None
    for left, right in ((at_z, call.a), (call.delta, at_g)):
        if left is not None and right is not None:
            left = left.t()
            found = left @ right if found is None else torch.addmm(found, left, right, out=found)
    return found
