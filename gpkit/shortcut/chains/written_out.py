"""The double backward pass of a chain, written out: without a graph, and its nodes of small steps.

A chain has layers z_i = a_i W_iᵀ + b_i with a_i = h_i(z_{i-1}), from i = 1 to k. With δ_k, the
gradient of an output in z_k, the gradients of the others are

    G_i = δ_i W_i,    δ_{i-1} = G_i h_i'(z_{i-1}).

Let T be made of δ, of a and of G_1. With x̂ for ∂T/∂x, and v for all of δ̂_{i-1}, the way up is

    Ĝ_i = v h_i'(z_{i-1}),    ẑ_{i-1} = v G_i h_i''(z_{i-1}),    δ̂_i += Ĝ_i W_iᵀ,

and the way down, with what the loss makes of δ̂_k and of its own gradient as ẑ_k,

    Ŵ_i = ẑ_iᵀ a_i + δ_iᵀ Ĝ_i,    b̂_i = Σ ẑ_i,    â_i += ẑ_i W_i,    ẑ_{i-1} += â_i h_i'(z_{i-1}).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpkit.shortcut.chains.activations import Activation, Slope

Some = Sequence[Tensor | None]


class Inwards(NamedTuple):
    """What the way to the first layer gives, for each layer, from the last one.

    Args:
        deltas: δ.
        products: G.
        slopes: h'(z), with what is kept of it for h''.
    """

    deltas: list[Tensor]
    products: list[Tensor]
    slopes: list[Slope]


class Link(NamedTuple):
    """A layer of a chain, and the function before it.

    Args:
        a: the input ``[B, q]``.
        weight: W ``[p, q]``.
        bias: b ``[p]``, or None.
        activation: h, which a comes from; None in the first layer.
        s: what the derivatives of h are functions of, ``[B, q]``, see `Activation`.
        numbers: of h.
    """

    a: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: Activation | None
    s: Any
    numbers: tuple[Any, ...]


def inwards(delta: Tensor, links: Sequence[Link], *, through: bool) -> Inwards:
    """Return δ, G and h' of each layer, from the last one; without a graph.

    Args:
        delta: δ of the last layer, ``[B, p]``.
        links: the layers, from the last one.
        through: whether to go through the first layer, so that G_1 is the last of G.
    """
    deltas, products, slopes = [delta], [], []
    for a, weight, _, activation, s, numbers in links:
        if activation is not None:
            slopes.append(slope := activation.slope(s, a, *numbers))
            products.append(delta := delta @ weight)
            deltas.append(delta := delta * slope[0])
        elif through:
            products.append(delta @ weight)
    return Inwards(deltas, products, slopes)


def upwards(
    links: Sequence[Link], found: Inwards, at_delta: Some, at_product: Tensor | None
) -> tuple[Tensor | None, list[Any], list[Any]]:
    """Return all of δ̂_k, and Ĝ_i and v G_i h_i''(z_{i-1}) of each layer, from the last one.

    With G_1, δ_k is a constant, and the first is of no use.

    Args:
        links: the layers.
        found: δ, G and h' of each layer.
        at_delta: δ̂ of each layer, as far as T is made of δ.
        at_product: Ĝ_1, if T is made of it.
    """
    count = len(links)
    hats: list[Tensor | None] = [None] * count
    curves: list[Tensor | None] = [None] * count
    hats[-1], v = at_product, at_delta[-1]
    if at_product is not None:
        v = plus_product(v, at_product, links[-1].weight.t())
    for i in reversed(range(count - 1)):
        a, weight, _, activation, s, numbers = links[i]
        if v is None or activation is None:
            v = at_delta[i]
            continue
        slope, kept = found.slopes[i]
        hats[i] = hat = v * slope
        if activation.second is not None:
            curves[i] = activation.second(v, found.products[i], s, a, kept, *numbers)
        if i or at_product is None:
            v = plus_product(at_delta[i], hat, weight.t())
    return v, hats, curves


def downwards(
    links: Sequence[Link],
    found: Inwards,
    hats: Some,
    curves: Some,
    at_a: Some,
    at_z: Tensor | None,
) -> list[Tensor | None]:
    """Return Ŵ and b̂ of each layer that has it, in the order of `parameters`; None is zero.

    Args:
        links: the layers.
        found: δ, G and h' of each layer.
        hats: Ĝ of each layer.
        curves: v G_i h_i''(z_{i-1}) of each layer.
        at_a: â of each layer, as far as T is made of a.
        at_z: ẑ_k.
    """
    made: list[Tensor | None] = []
    z = at_z
    for i, (a, weight, own, activation, _, _) in enumerate(links):
        delta, hat = found.deltas[i], hats[i]
        matrix = None if z is None else z.t() @ a
        if hat is not None:
            matrix = plus_product(matrix, delta.t(), hat, out=matrix)
        made.append(matrix)
        if own is not None and z is None:  # autograd gives zeros, where h'' is zero
            made.append(torch.zeros_like(own) if i else None)
        elif own is not None and z is not None:
            made.append(z.sum(0))
        if activation is None:
            break
        whole, curve = at_a[i], curves[i]
        if activation.of_result and curve is not None:
            whole = curve if whole is None else curve.add_(whole)
        if z is not None:
            whole = plus_product(whole, z, weight)
        z = None if whole is None else whole * found.slopes[i][0]
        if not activation.of_result and curve is not None:
            z = curve if z is None else z.add_(curve)
    return made


def parameters(links: Sequence[Link]) -> list[Tensor]:
    """Return the weight and the bias of each layer, from the last one."""
    pairs = [(link.weight, link.bias) for link in links]
    return [x for pair in pairs for x in pair if x is not None]


def plus_product(
    given: Tensor | None, left: Tensor, right: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return given + left right, where None is zero; in the memory of ``out``, if it is given."""
    return left @ right if given is None else torch.addmm(given, left, right, out=out)
