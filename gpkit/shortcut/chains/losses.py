"""A loss and the penalty of its gradient in the weights, by the chain of all layers of the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gpkit.autodiff import graph
from gpkit.autodiff.compat import class_of
from gpkit.autodiff.layers.gram import Rows, gram_is_cheaper, gram_product, may_pay, rows_norm
from gpkit.autodiff.numerics import squared_length
from gpkit.shortcut.chains.nodes import HeldTotal, Total
from gpkit.shortcut.chains.places import LINEAR, Chain, chain_at
from gpkit.shortcut.chains.proof import agrees
from gpkit.shortcut.chains.written_out import Link, inwards, parameters
from gpkit.shortcut.compat import applied, differentiable


class LossChain:
    """The chain of all layers of a loss, for graphs that were made in the same way.

    Args:
        chain: the chain.
        last: the place of the last layer's node among the nodes of the graph.
    """

    def __init__(self, chain: Chain, last: int) -> None:
        self.chain, self.last = chain, last

    @classmethod
    def of(
        cls, loss: Tensor, nodes: Sequence[Any], ends: Sequence[Any], xs: Sequence[Tensor]
    ) -> LossChain | None:
        """Return the chain of a loss; None if other layers or parameters matter as well.

        Args:
            loss: a number, or losses ``[B]``.
            nodes: of its graph.
            ends: nodes of layers at whose outputs gradients are needed.
            xs: parameters in which gradients are needed.
        """
        users = Counter(parent for node in nodes for parent, _ in node.next_functions)
        for i, last in enumerate(nodes):
            found = chain_at(last, None, users) if class_of(last) in LINEAR else None
            if found is None:
                continue
            (chain, own), ids = found, {*map(id, xs)}
            links = chain.links(own)
            if links and {*ends} <= {*own} and ids <= {*map(id, parameters(links))}:
                return cls(chain, i) if is_right(loss, chain, own, links) else None
        return None

    def begin(self, loss: Tensor, nodes: Sequence[Any]) -> LossPass | None:
        """Return the gradients of a loss in its layers; None if what the graph holds does not suit.

        Args:
            loss: a number, or losses ``[B]``, whose sum is differentiated.
            nodes: of the graph.
        """
        own = self.chain.nodes(nodes[self.last])
        links = None if own is None else self.chain.links(own)
        if own is None or links is None:
            return None
        (delta,) = differentiable(loss, [GradientEdge(own[0], 0)])
        if delta is None or (loss.ndim and len(delta) != len(loss)):  # as of several rows a sample
            return None
        return LossPass(own[0], links, delta)


class LossPass:
    """A loss with its gradients in the layers of its chain, from which a penalty is computed.

    Args:
        last: the node of the last layer.
        links: the values of the layers.
        delta: the gradient at the output of the last one, with its graph.
    """

    def __init__(self, last: Any, links: list[Link], delta: Tensor) -> None:
        self.last, self.links, self.delta = last, links, delta
        with torch.no_grad():
            self.found = inwards(delta, links, through=False)
        last, *others = self.found.deltas
        self.delta_leaves = [last.detach().requires_grad_(), *(d.requires_grad_() for d in others)]
        # The first layer's input is not trained.
        self.a_leaves = [link.a.detach().requires_grad_() for link in links[:-1]]
        self.inputs = [*self.a_leaves, links[-1].a]

    def squared_norms(self, variables: Collection[int], *, sample: bool) -> Tensor:
        """Return n² ``[G]`` of the gradient in parameters, as a function of δ and a.

        Args:
            variables: the ids of the parameters.
            sample: whether each sample has a norm; or the sum over them has one.
        """
        layers = zip(self.links, self.delta_leaves, self.inputs, strict=True)
        if sample:
            rows: list[Rows] = []
            for link, delta, a in layers:
                rows += [(delta, a)] if id(link.weight) in variables else []
                rows += [(delta, None)] if id(link.bias) in variables else []
            return rows_norm(rows)
        products, gradients = [], []
        for link, delta, a in layers:
            p, q = link.weight.shape
            if id(link.weight) in variables:
                if may_pay(p, q) and gram_is_cheaper(1, len(a), p, q):
                    products.append(gram_product(delta, a))
                else:
                    gradients.append(delta.t() @ a)
            if id(link.bias) in variables:
                gradients.append(delta.sum(0))
        found = [squared_length((*gradients,))] if gradients else []
        return sum([*found, *products[1:]], products[0]) if products else found[0]

    def total(
        self,
        mean: Tensor,
        added: Callable[[Tensor], Tensor],
        again: Callable[[], Tensor],
        leaves: Sequence[Tensor],
    ) -> Tensor | None:
        """Return the loss with its penalty; its backward pass does not go through the chain.

        Args:
            mean: the mean loss, with its graph.
            added: returns the total T for a number in place of the mean loss. T is made of that,
                of n², and maybe of parameters of a form.
            again: returns the total anew, with the graph of the loss itself.
            leaves: of the graph of the loss.

        Returns:
            The number; None if a form is made of parameters of the chain.
        """
        leaf = mean.detach().requires_grad_()
        own = [leaf, *self.delta_leaves, *self.a_leaves]
        total, chained = added(leaf), parameters(self.links)
        outside, ids = graph.leaves_outside(total, own), {*map(id, chained)}
        if any(id(x) in ids for x in outside):
            return None
        ids.update(map(id, own))
        others = [*{id(x): x for x in (*leaves, *outside) if id(x) not in ids}.values()]
        ends = (total, own), (mean, self.delta, GradientEdge(self.last, 0)), others
        held = HeldTotal(self.links, self.found, *ends, again)
        return applied(Total, held, *chained, *others)


def is_right(loss: Tensor, chain: Chain, nodes: Sequence[Any], links: Sequence[Link]) -> bool:
    """Whether autograd finds the same gradients as the formulas, and nothing changes them."""
    ones, edges = torch.ones_like(loss), [GradientEdge(node, 0) for node in nodes[::2]]
    first = nodes[-1].next_functions[chain.layers[-1].rows + 1][0]  # so that its hooks are met
    ends: Any = [*edges, GradientEdge(first, 0)]
    (delta,) = torch.autograd.grad(loss, ends[:1], ones, retain_graph=True)
    with torch.no_grad():
        deltas = inwards(delta, links, through=False).deltas
        mine = [*deltas, links[-1].a.t() @ deltas[-1]]
    return agrees(loss, ones, chain, nodes, ends, mine)
