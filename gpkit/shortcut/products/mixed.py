"""A part of a gradient and a part of another one, added up without a second copy of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gpkit.autodiff import graph
from gpkit.autodiff.compat import class_of, packs_saved, saved
from gpkit.autodiff.known_gradient import Difference
from gpkit.shortcut.chains.places import LINEAR, parameters_of, used_alone

LARGE = 2**16  # entries of a weight; a hook on it takes some 15 µs


class Layer(NamedTuple):
    """A linear layer z = a Wᵀ + b that is called once.

    Args:
        a: its input ``[B, q]``.
        edge: where the gradient in z ``[B, p]`` arrives.
    """

    a: Tensor
    edge: GradientEdge


def mixed(
    y: Tensor,
    leaves: Sequence[Tensor],
    base: Sequence[Tensor],
    fraction: Any,
    derivatives: Callable[[Tensor, Sequence[Any]], Sequence[Tensor | None]],
) -> Sequence[Tensor]:
    """Return (1 - fraction) · base + fraction · ∇y in all leaves.

    A large gradient is added as soon as the backward pass has it, so that there is one at a time.
    That of a linear layer with few rows is not made: its product δᵀ a is added to the base.

    Args:
        y: a number.
        leaves: the tensors.
        base: a gradient, which is overwritten; see `are_apart`.
        fraction: a number, or a tensor that holds one.
        derivatives: returns ∇y in leaves and at edges; None is zero.
    """
    added: set[int] = set()
    nothing = base[0].new_zeros(())

    def mix(i: int, g: Tensor) -> Tensor | None:
        to = base[i]
        if g.layout != to.layout or g.dtype != to.dtype:
            return None
        added.add(i)
        to.lerp_(g, fraction)
        return nothing.expand_as(g)  # takes no memory

    large = [i for i, size in enumerate(map(Tensor.numel, leaves)) if size >= LARGE]
    own: dict[int, Layer] = {}
    if isinstance(fraction, float):
        own = layers_of(y, {id(leaves[i]): i for i in large}, base)
    hooks = [leaves[i].register_hook(partial(mix, i)) for i in large if i not in own]
    ends = [own[i].edge if i in own else leaf for i, leaf in enumerate(leaves)]
    try:
        found = derivatives(y, ends)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for i, layer in own.items():
            delta = found[i]
            if delta is None:
                base[i].mul_(1 - fraction)
            else:
                base[i].addmm_(delta.t(), layer.a, beta=1 - fraction, alpha=fraction)
    rest = [i for i in range(len(leaves)) if i not in added and i not in own]
    here = [base[i] for i in rest]
    there = dense([found[i] for i in rest], [leaves[i] for i in rest])
    result = [*base]
    together = Difference((), here, there, fraction).added_to(here, 1.0, overwrite=True)
    for i, g in zip(rest, together, strict=True):
        result[i] = g
    return result


def dense(grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients that are not sparse, and zeros where one is None."""
    return [
        torch.zeros_like(leaf) if g is None else g.to_dense() if g.is_sparse else g
        for g, leaf in zip(grads, leaves, strict=True)
    ]


def layers_of(y: Tensor, places: dict[int, int], base: Sequence[Tensor]) -> dict[int, Layer]:
    """Return the linear layers with few rows that use weights alone.

    Args:
        y: a number with its graph.
        places: of the weights among all leaves, by their ids.
        base: the gradients that the products are to be added to.

    Returns:
        The layers, by the places of their weights.
    """
    nodes, _ = graph.walked(y)
    users = Counter(parent for node in nodes for parent, _ in node.next_functions)
    found: dict[int, Layer] = {}
    for node in nodes:
        if class_of(node) not in LINEAR or packs_saved(node):
            continue
        rows, name = LINEAR[class_of(node)]
        weight, _ = parameters_of(node, rows) or (None, None)
        i, a = places.get(id(weight)), saved(node, name)
        if weight is None or i is None or a is None or not used_alone(node, rows, users):
            continue
        p, q = weight.shape
        factors = saved(node, "alpha"), saved(node, "beta")
        plain = factors in ((1, 1), (1, None), (None, None)) and base[i].layout == torch.strided
        if plain and a.dtype == base[i].dtype == weight.dtype and len(a) * (p + q) < p * q:
            found[i] = Layer(a, GradientEdge(node, 0))
    return found
