"""Penalties in the weights under FSDP2, where each process holds a shard of every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.gates import Gates, recorded
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.known_gradient import known_gradient
from gpkit.autodiff.numerics import as_real, spacing, widened, zeros_for_none
from gpkit.autodiff.sharding.gathering import reshard
from gpkit.axes.given.given import Given, completed
from gpkit.estimators.base import Recomputable
from gpkit.estimators.differences.moves import perturbed
from gpkit.estimators.differences.weight_difference import slopes_of
from gpkit.formula import Terms
from gpkit.gradient_penalty import NO_GRAPH
from gpkit.lightning.callback.sharded_given import in_shards
from gpkit.penalty import Penalty

Entry = Callable[[Tensor], Tensor]  # a function of each entry of a tensor
Gradient = Mapping[Tensor, Tensor | None]  # by trained weight; None if backward did not reach it


class ShardedWeights:
    r"""Evaluates penalties in the weights of a net that FSDP2 has sharded.

    .. math:: \nabla_\theta \, \|\bar g\|^2 = 2 H \bar g
              \approx 2 n \, \frac{\bar g(\theta + h v) - \bar g(\theta)}{h},
              \quad \bar g \text{ averaged over the processes}, \; n = \|\bar g\|, \; v = \bar g / n

    by `finite_difference`; its docstring has the sides, the step h and the other norms. FSDP's own
    backward computes each gradient of the loss. One penalty takes two forward and backward passes
    in all (three for "central"), and each further one takes one more (two). The shards are moved in
    place and restored bit for bit, also after an error; n and h take an all-reduce of a few
    numbers. In a training step::

        before = start_of(net, device)
        given = Recomputable(closure(), closure, before)
        loss, terms = sharded_weights.terms({"gp": penalty}, given)

    Args:
        net: a module to which ``fully_shard`` was applied, or a submodule of which. Its parameters
            are listed now, so create this object before the first step.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        with self.reshard_at_end():
            self.parameters = list(net.parameters())

    def terms(
        self,
        penalties: Mapping[str, Penalty],
        given: Recomputable,
        step: int | None = None,
        *,
        retain: bool = False,
        compared: Mapping[str, Given] | None = None,
    ) -> tuple[Tensor, dict[str, Terms | None]]:
        """Return the loss and the terms of the penalties, and count a step.

        Their gradients have been computed when this returns. Backward only copies them to the
        shards, without FSDP, and the graph behind ``given.value`` is gone. ``.grad`` is unchanged.

        Args:
            penalties: in the weights, by finite differences, by name.
            given: the loss ``[]`` of this process's samples, a function that recomputes it (without
                side effects on logs and metrics; buffers and random numbers are handled here), and
                the RNG state before it.
            step: the optimiser step; None counts the calls.
            retain: whether to keep the graph behind ``given.value``.
            compared: the target and the metric of penalties, by name: whole tensors, the same on
                all processes, or DTensors.

        Returns:
            The loss of this process; and the terms by name, None for a penalty that does not act on
            this step. Norms and values are those of all processes. If no penalty acts, the loss
            keeps its own graph.

        Raises:
            RuntimeError: if the loss has no graph, or no gradient arrives at the weights of a
                penalty.
        """
        if not any(penalty.acts_at(step) for penalty in penalties.values()):
            for penalty in penalties.values():
                penalty.skip(step)
            return given.value, dict.fromkeys(penalties)
        if not given.value.requires_grad:
            raise RuntimeError(NO_GRAPH)
        nodes = [*graph.nodes(given.value)]
        leaves = graph.leaves(given.value, nodes)
        epsilon = max(spacing(given.value, *leaves), graph.spacing_of(nodes))
        with recorded(given.value) as gates:
            base = self.gradient(given.value, retain=retain)
        known = (given, base, gates, epsilon)
        terms = {
            name: penalty.act_with(partial(self.term, penalty, other, *known), step)
            for name, penalty in penalties.items()
            for other in [(compared or {}).get(name)]
        }
        return known_gradient(given.value, list(base), zeros_for_none(base.values(), base)), terms

    def term(
        self,
        penalty: Any,
        other: Given | None,
        given: Recomputable,
        base: Gradient,
        gates: Gates,
        epsilon: float,
        weight: float,
    ) -> Terms:
        """Return the terms of one penalty.

        Args:
            penalty: in the weights, by finite differences.
            other: the target and the metric that the gradient is compared with.
            given: the loss, and a function that recomputes it.
            base: the gradient of the loss.
            gates: of the loss.
            epsilon: machine epsilon of the dtype that the loss is computed in, see `spacing`.
            weight: the factor of the reduced value.

        Returns:
            The terms, with G = 1.

        Raises:
            RuntimeError: if no gradient has arrived at its weights.
        """
        chosen = penalty.wrt.chosen(self.net)
        compared = in_shards(completed(other, penalty), chosen)
        if all(base[x] is None for x in chosen):
            raise RuntimeError(
                "no gradient arrived at the sharded weights of a penalty: does the loss depend on "
                "them, and is set_requires_gradient_sync(True) on?"
            )

        def gradient(moves: list[Tensor] | None) -> list[Tensor]:
            if moves is None:
                return zeros_for_none(base.values(), base)
            with self.reshard_at_end(), perturbed(local_shards(chosen), local_shards(moves)):
                again = isolated(given.function, given.state, given.value.device, twice=False)
                with torch.enable_grad(), again:
                    loss = given.function()
                penalty.estimator.hold(gates, loss)
                return zeros_for_none(self.gradient(loss).values(), base)

        grads = zeros_for_none([base[x] for x in chosen], chosen)
        norm = penalty.form.norm
        known = (chosen, grads, norm, epsilon, gradient, reduce_over_shards)
        n, slopes = slopes_of(penalty.estimator, *known, compared)
        n2 = known_gradient(n.square().reshape(1), list(base), slopes)
        return formula.terms(penalty, n2, weight, observe=True)

    def gradient(self, loss: Tensor, *, retain: bool = False) -> Gradient:
        """Return the gradient of a loss, averaged over the processes; ``.grad`` is unchanged."""
        kept = {p: p.grad for p in self.parameters if p.requires_grad}
        for p in kept:
            p.grad = None
        try:
            with self.reshard_at_end(), torch.autocast(loss.device.type, enabled=False):
                loss.backward(retain_graph=retain)
            return {p: p.grad for p in kept}
        finally:
            for p, grad in kept.items():
                p.grad = grad

    @contextmanager
    def reshard_at_end(self) -> Iterator[None]:
        """Free the gathered weights at the end of the block, so the next forward gathers them."""
        try:
            yield
        finally:
            reshard(self.net)


def local_shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the local shard of each tensor, without a copy."""
    return [t.detach().to_local() for t in tensors]  # type: ignore[attr-defined]


def reduce_over_shards(tensors: Sequence[Tensor], entry: Entry, reduce: str = "sum") -> Tensor:
    """Return the sum, or the maximum, of a function over the entries of all shards.

    It takes one all-reduce for each way in which the tensors are sharded.

    Args:
        tensors: DTensors, with the same layouts on every process.
        entry: a function >= 0 of each entry; 0 stands in for an empty shard.
        reduce: "sum" or "max".

    Returns:
        One number, the same on every process.
    """
    reduction = torch.sum if reduce == "sum" else torch.amax
    ways: dict[Any, list[Tensor]] = {}
    for t, shard in zip(tensors, local_shards(tensors), strict=True):
        part = entry(as_real(widened(shard))).reshape(-1)
        part = reduction(torch.cat([part, part.new_zeros(1)]), 0)  # a shard may be empty
        ways.setdefault((t.device_mesh, t.placements), []).append(part)  # type: ignore[attr-defined]
    totals = []
    for (mesh, placements), parts in ways.items():
        layout = [p if p.is_replicate() else Partial(reduce) for p in placements]
        total = DTensor.from_local(reduction(torch.stack(parts), 0), mesh, layout, run_check=False)
        totals.append(total.full_tensor())
    return reduction(torch.stack(totals), 0)
