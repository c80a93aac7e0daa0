"""The shortcut of a weight penalty of a loss, whose graph is compared with earlier ones."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.compat import children_of, couples_samples
from gpkit.autodiff.derivatives import MENDED
from gpkit.autodiff.layers.batch import gram_pays, norm_of
from gpkit.autodiff.layers.norms import is_proven, sample_norms
from gpkit.autodiff.layers.places import Place, call_at, is_straight, place_of, products
from gpkit.autodiff.layers.recording import LayerCall, Recording
from gpkit.autodiff.layers.rules import BATCH_NORMS
from gpkit.autodiff.reached import family_of
from gpkit.axes.call import Arguments
from gpkit.axes.parameters import weights
from gpkit.estimators.base import Recomputable, Target
from gpkit.estimators.exact import exact
from gpkit.formula import Terms
from gpkit.shortcut.chains import LossChain, LossPass
from gpkit.shortcut.compat import differentiable
from gpkit.shortcut.earlier import Earlier
from gpkit.shortcut.net import Choices
from gpkit.shortcut.products.summed import note_joins, wide_places, with_summed_products

MANY = 64


class LossGraph:
    """How the graph of a loss was made, and the norm of its gradient in the weights.

    Args:
        make: of the graph, see `graph.walked`.
        leaves: of the graph.
        xs: the variables.
        places: of the calls of layers whose norms need no gradient in the weights.
        net: the module, if each sample has a norm, by the rules of its layers.
    """

    def __init__(
        self,
        make: list[Any],
        leaves: Sequence[Tensor],
        xs: Sequence[Tensor],
        places: Sequence[Place],
        *,
        net: nn.Module | None = None,
    ) -> None:
        self.make, self.places, self.sample = make, places, net is not None
        self.chain: LossChain | None = None
        self.family = [*map(weakref.ref, () if net is None else family_of([net]))]
        self.with_mode = [p.layer for p in places if isinstance(p.layer(), BATCH_NORMS)]
        kinds = [kind.__name__ for kind in make if isinstance(kind, type)] if self.sample else []
        self.norms = [i for i, kind in enumerate(kinds) if "BatchNorm" in kind]
        self.variables, self.xs = {*map(id, xs)}, [*map(weakref.ref, xs)]
        self.wide = wide_places(places, self.variables)
        self.leaves = [*map(weakref.ref, weights_among(leaves, self.variables))]

    @classmethod
    def after(
        cls, loss: Tensor, target: Target, layers: Recording | None, net: nn.Module | None
    ) -> LossGraph | None:
        """Return how the graph of a loss was made; None if it has not what layers were given.

        Args:
            loss: with its graph.
            target: what the penalty has differentiated.
            layers: the calls of the net's layers, if each sample has a norm.
            net: the module, if so.
        """
        nodes, make = graph.walked(loss)
        leaves = graph.leaves(loss, nodes)
        places = products_in(nodes, target) if layers is None else layers_in(nodes, layers)
        if places is None:
            return None
        return cls(make, leaves, target.xs, places, net=net)

    def find_chain(self, loss: Tensor) -> None:
        """Find the chain of all layers that matter, if they are one, in a graph of this make."""
        nodes, _ = graph.walked(loss)
        used = {*map(id, graph.leaves(loss, nodes))}
        xs: list[Any] = [] if self.sample else [ref() for ref in self.xs if id(ref()) in used]
        self.chain = LossChain.of(loss, nodes, [nodes[place.z] for place in self.places], xs)

    def state_of(self, net: Any) -> tuple[list[bool], list[int]]:
        """Return the modes of the net and of layers whose rule asks for it, and the layers.

        The latter where each sample has a norm: a layer may be replaced by another one with the
        same weight, and the graph does not tell.
        """
        modules: list[Any] = [net, *(ref() for ref in self.with_mode)]
        parts: Any = filter(None, [ref() for ref in self.family])
        children = chain.from_iterable(map(dict.values, map(children_of, parts)))
        modes = [module is not None and module.training for module in modules]
        return modes, [*map(id, children)]

    def holds(self, nodes: Sequence[Any], leaves: Sequence[Tensor]) -> bool:
        """Whether a graph of this make has the same weights and modes.

        Args:
            nodes: of the graph.
            leaves: of the graph.

        Returns:
            Whether it has, and all variables are trained.
        """
        owned = weights_among(leaves, self.variables)
        if [*map(id, owned)] != [id(ref()) for ref in self.leaves]:
            return False
        if self.norms and any(couples_samples(nodes[i]) for i in self.norms):
            return False
        xs: list[Any] = [ref() for ref in self.xs]
        return all(x is not None and x.requires_grad for x in xs)

    def calls_at(self, nodes: Sequence[Any]) -> list[LayerCall] | None:
        """Return the calls of layers in a graph that `holds`; None if one is not as it was."""
        calls: list[Any] = [call_at(place, nodes) for place in self.places]
        return calls if all(calls) else None

    def begin(self, loss: Tensor, mean: Tensor, nodes: list[Any]) -> LossPass | None:
        """Return the gradients at the layers, written out, if these are a chain.

        Args:
            loss: a number, or losses ``[B]``.
            mean: of the losses.
            nodes: of the graph.
        """
        whole = loss if self.sample else mean
        return None if self.chain is None else self.chain.begin(whole, nodes)

    def that_pay(self, calls: list[LayerCall]) -> list[LayerCall]:
        """Return the calls that spare the gradient in the weights."""
        return calls if self.sample else [*filter(gram_pays, calls)]

    def squared_norms(
        self, calls: list[LayerCall], loss: Tensor, mean: Tensor, net: Any
    ) -> Tensor | None:
        """Return n² ``[G]``, by these calls of layers; None if these are not what they were.

        Args:
            calls: of layers in the graph.
            loss: a number, or losses ``[B]``.
            mean: of the losses.
            net: the module.
        """
        xs: list[Any] = [ref() for ref in self.xs]
        if not self.sample:
            n2 = norm_of(mean, xs, Recording(net, calls), differentiable)
            return n2 if n2.requires_grad else None
        n2 = sample_norms(loss.reshape(-1), xs, Recording(net, calls), differentiable)
        for call in calls:
            if call.delta is None or call.delta.shape[0] != loss.shape[0]:
                return None
        return n2 if n2.requires_grad else None


def weights_among(leaves: Sequence[Tensor], variables: Collection[int]) -> list[Tensor]:
    """Return the leaves of a graph that are weights; an input that needs a gradient is none.

    Args:
        leaves: of the graph.
        variables: the ids of parameters, which may be no ``nn.Parameter``.
    """
    return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) or id(leaf) in variables]


def is_loss(axes: Any, loss: Any, targets: Sequence[Target]) -> bool:
    """Whether the formula is its plain case: the l2 norm of one gradient in the weights."""
    return (
        type(axes.estimator) is exact
        and type(axes.wrt) is weights
        and axes.of in ("output", "loss")
        and axes.order == 1
        and axes.form.norm == "l2"
        and not (axes.named or axes.metric or axes.given or axes.subsample or axes.elementary)
        and len(targets) == 1
        and targets[0].rows is targets[0].window is targets[0].weights is None
        and not MENDED.keys() & targets[0].fingerprint.kinds
        and all(leaf.requires_grad for leaf in targets[0].fingerprint.leaves)  # none frozen since
        and type(loss) is Tensor
        and loss.numel() == (len(loss) if loss.ndim else 1)
        and not torch.is_autocast_enabled(loss.device.type)
    )


class Losses(Earlier):
    """The graphs of losses of earlier calls."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[LossGraph, Any]] = {}
        self.choices: Any = None

    def note(
        self,
        axes: Any,
        loss: Tensor,
        args: tuple[Any, ...],
        target: Target,
        layers: Recording | None = None,
    ) -> None:
        """Remember a call with a loss.

        Args:
            axes: the penalty, for which `is_loss`.
            loss: with its graph.
            args: the module or its parameters.
            target: what the penalty has differentiated.
            layers: the calls of the net's layers, if norms of samples were taken from them.
        """
        who, sample = who_is(args), axes.scope == "sample"
        if loss.grad_fn is None or who is None or sample == (layers is None):
            return
        if layers is not None and not is_proven(args[0]):
            return
        if len(self.known) >= MANY or self.choices is None or not self.choices.hold(axes):
            self.known.clear()
        self.choices = Choices(axes)
        made = LossGraph.after(loss, target, layers, args[0] if sample else None)
        if made is not None:
            self.known[(who, *made.make)] = made, made.state_of(args[0]) if sample else None

    def squared_norms(self, axes: Any, call: Arguments) -> Tensor | None:
        """Return n² ``[G]`` of a call that repeats an earlier one; None if it does not."""
        found = self.taken(axes, call, joins=False)
        return None if found is None else found[0]

    def terms(self, axes: Any, call: Arguments) -> Terms | None:
        """Return the terms of such a call that is trained on; None if it does not repeat one."""
        found = self.taken(axes, call, joins=True)
        if found is None:
            return None
        n2, mean, calls, leaves = found
        terms = formula.terms(axes, n2, call.weight, observe=True)
        if any(own.joins for own in calls):
            join = partial(with_summed_products, calls=calls, leaves=leaves, parts=(mean, n2))
            terms.ready = mean, join
        return terms

    def taken(
        self, axes: Any, call: Arguments, *, joins: bool
    ) -> tuple[Tensor, Tensor, list[LayerCall], list[Tensor]] | None:
        """Return n² of a call that repeats an earlier one, the loss, its layers and its leaves.

        Args:
            axes: the penalty.
            call: its arguments.
            joins: whether to note which layers join their products, see `with_summed_products`.
        """
        loss, who = call.f, who_is(call.args)
        loss = loss.value if type(loss) is Recomputable else loss
        if who is None or call.real is not None or call.fake is not None:
            return None
        if not self.choices.hold(axes) or torch.is_autocast_enabled(loss.device.type):
            return None
        nodes, make = graph.walked(loss)
        known, state = self.known.get((who, *make), (None, None))
        if known is None:
            return None
        net = call.args[0] if known.sample else None
        if known.sample and (loss.ndim == 0 or known.state_of(net) != state):
            return None
        leaves, mean = graph.leaves(loss, nodes), loss if loss.ndim == 0 else loss.mean()
        calls = known.calls_at(nodes) if known.holds(nodes, leaves) else None
        if calls is None:
            return None
        if joins:
            note_joins(calls, known.wide)
        calls = known.that_pay(calls)
        n2 = known.squared_norms(calls, loss, mean, net)
        return None if n2 is None else (n2, mean, calls, leaves)


def products_in(nodes: Sequence[Any], target: Target) -> list[Place]:
    """Return the places of products with wide weights in a graph that was differentiated.

    These are such that no hook on the product was seen to change the gradient.
    """
    calls = () if target.layers is None else target.layers.calls
    straight = {
        call.z.node: is_straight(call)
        for call in calls
        if isinstance(call.z, GradientEdge)
        and (call.straight or (call.straight is None and not call.a.requires_grad))
    }
    places = [place for place in products(nodes, target.xs) if nodes[place.z] in straight]
    return [Place(*place[:-1], joins=straight[nodes[place.z]]) for place in places]


def layers_in(nodes: Sequence[Any], layers: Recording) -> list[Place] | None:
    """Return the places of recorded calls in a graph; None if what one was given is not in it."""
    at = {node: i for i, node in enumerate(nodes)}
    places: list[Any] = [place_of(call, nodes, at) for call in layers.calls]
    return places if all(places) else None


def who_is(args: tuple[Any, ...]) -> Any:
    """Return what tells the module or the parameters of a call from others, or None."""
    if len(args) != 1:
        return None
    if isinstance(args[0], nn.Module):
        return id(args[0])
    return (*map(id, args[0]),) if type(args[0]) in (list, tuple) else None
