"""The gradient of an output in an input, by the chain between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gpkit.autodiff import graph
from gpkit.autodiff.compat import LEAF, class_of
from gpkit.autodiff.derivatives import unhooked
from gpkit.autodiff.numerics import WIDE
from gpkit.shortcut.chains.nodes import HeldGradient, InputGradient
from gpkit.shortcut.chains.places import LINEAR, Chain, chain_at
from gpkit.shortcut.chains.proof import agrees
from gpkit.shortcut.chains.written_out import parameters
from gpkit.shortcut.compat import RUN, applied

MOST = 4  # nodes between an output and the last layer, such as of a squeeze


class InputChain:
    """The chain between an output and an input, for graphs that were made in the same way.

    Args:
        chain: the chain.
        ways: which operands lead from the node of an output to that of the last layer, by the
            number of dimensions of the output.
    """

    def __init__(self, chain: Chain, ways: dict[int, Sequence[int]]) -> None:
        self.chain, self.ways = chain, ways

    @classmethod
    def between(cls, y: Tensor, x: Tensor) -> InputChain | None:
        """Return the chain, if all that the output is computed from passes through it.

        Args:
            y: ``[B]`` or ``[B, 1]``. An output ``[B]`` of the same graph may lack its last node.
            x: a leaf ``[B, n]``.
        """
        if not x.is_leaf or x.ndim != 2 or y.grad_fn is None or y.dtype not in WIDE:
            return None
        nodes = [*graph.nodes(y)]
        users = Counter(parent for node in nodes for parent, _ in node.next_functions)
        last: Any = y.grad_fn
        way: list[int] = []
        while class_of(last) not in LINEAR:
            places = [i for i, (parent, _) in enumerate(last.next_functions) if parent is not None]
            if len(places) != 1 or len(way) > MOST:
                return None
            way += places
            last = last.next_functions[places[0]][0]
        leaf = next((node for node in nodes if getattr(node, LEAF, None) is x), None)
        found = None if leaf is None else chain_at(last, leaf, users)
        if found is None or users[leaf] != 1:
            return None
        chain, steps = found
        made, ones = cls(chain, {1: way[1:], y.ndim: way}), torch.ones_like(y)
        ends: list[Any] = [GradientEdge(last, 0), x]
        with unhooked((x,)):
            g = made.gradient(y, x, ones)
            (delta,) = torch.autograd.grad(y, ends[:1], ones, retain_graph=True)
            same = agrees(y, ones, chain, steps, ends, [delta, g], None if way else ones)
        return made if same else None

    def gradient(self, y: Tensor, x: Tensor, ones: Tensor) -> Tensor | None:
        """Return the gradient of Σ y in the input, with a graph; None if the graph is another.

        Its backward pass does not go through the graph of y.

        Args:
            y: ``[B]`` or ``[B, 1]``, whose graph nothing else is differentiated through.
            x: the input.
            ones: in the shape of y.
        """
        last: Any = y.grad_fn
        way = self.ways[y.ndim]
        for place in way:
            operands = () if last is None else last.next_functions
            alone = all(node is None for i, (node, _) in enumerate(operands) if i != place)
            last = operands[place][0] if alone and place < len(operands) else None
        nodes = self.chain.nodes(last)
        if nodes is None:
            return None
        begin = nodes[-1].next_functions[self.chain.layers[-1].rows][0]
        links = self.chain.links(nodes) if getattr(begin, LEAF, None) is x else None
        if links is None:  # or more layers come before
            return None
        delta = ones
        if way:
            edge: Any = GradientEdge(last, 0)
            (found,) = RUN((y,), (ones,), True, True, (edge,), True, accumulate_grad=False)
            if found is None or found.requires_grad:  # such as that of a sigmoid
                return None
            delta = found
        held = HeldGradient(links, delta, (y, x, ones))
        return applied(InputGradient, held, *parameters(links))
