"""Penalties in the weights under FSDP2, where every process holds a shard of each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.known_gradient import known_gradient, perturbed
from gpkit.autodiff.numerics import spacing, widened, zeros_for_none
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.recomputable import Recomputable
from gpkit.formula import Terms
from gpkit.gradient_penalty import NO_GRAPH
from gpkit.needs import needs_of
from gpkit.penalty import Penalty

Entry = Callable[[Tensor], Tensor]


Gradient = Mapping[Tensor, Tensor | None]  # of every trained weight; None where nothing arrived


def is_sharded(net: nn.Module) -> bool:
    """Return whether FSDP2's ``fully_shard`` was applied to a module or to one inside of it.

    >>> is_sharded(nn.Linear(2, 1))
    False
    """
    return any(isinstance(module, FSDPModule) for module in net.modules())


def refusals(net: nn.Module, penalties: Mapping[str, Any]) -> list[str]:
    """Return what stands in the way of penalties on a sharded net: a line for each finding.

    FSDP2 computes with copies of the weights that it gathers before a forward or a backward pass
    and frees after it: a graph cannot be passed twice, and the shards that are trained are not in
    it. Gradients arrive at the shards averaged over the processes; no other gradient in the weights
    is to be had.

    Args:
        net: a module to which, or inside of which, ``fully_shard`` was applied.
        penalties: by name.

    Returns:
        The findings; none if all is well.
    """
    found = []
    for name, penalty in penalties.items():
        here = f"penalty {name!r} under FSDP:"
        needs = needs_of(penalty)
        if needs.environments:
            continue  # it differentiates in the logits, not through the net
        if not isinstance(penalty.estimator, finite_difference):
            kind = type(penalty.estimator).__name__
            found.append(
                f"{here} double backprop needs the gathered weights twice, and FSDP frees them "
                f"after one backward; got {kind}(): use estimator='finite_difference', or DDP"
            )
        if not needs.in_weights:
            continue
        if penalty.of not in ("loss", "output"):
            found.append(f"{here} of='loss' was expected; got of={penalty.of!r}: use DDP")
        if penalty.scope != "global":
            found.append(
                f"{here} gradients arrive averaged over the processes; got scope={penalty.scope!r}:"
                " use scope='global', or DDP"
            )
        if needs.measures:
            kind = type(penalty.weight).__name__
            found.append(f"{here} a weight that measures gradients, {kind}(), needs DDP")
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    whole = [n for n, p in trained if not isinstance(p, DTensor)]
    if whole:
        found.append(
            f"under FSDP every trained parameter must be sharded; not sharded, and so not averaged "
            f"over the processes: {', '.join(whole)}: apply fully_shard to what holds them"
        )
    return found


class ShardedWeights:
    r"""The weights of a net whose shards lie on several processes, and penalties in them.

    .. math:: \nabla_\theta \, \|\bar g\|^2 = 2 H \bar g
              \approx 2 n \, \frac{\bar g(\theta + h v) - \bar g(\theta)}{h},
              \quad \bar g \text{ averaged over the processes}, \; n = \|\bar g\|, \; v = \bar g / n

    by `finite_difference`, whose docstring has the sides, the step h and the other norms. The loss
    is differentiated by FSDP's own backward, each time anew: two forward and backward passes in
    all with one penalty (three for "central"), one more (two) for each further one. The shards are
    moved where they lie, and given back bit for bit, also after an error; n and h take an
    all-reduce of a few numbers. In a training step::

        before = random_state(device)
        given = Recomputable(closure(), closure, before)
        loss, terms = sharded_weights.terms({"gp": penalty}, given)

    Args:
        net: a module to which, or inside of which, ``fully_shard`` was applied. Its parameters are
            taken as they are now, so this comes before the first step.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        with self.gathered_anew():
            self.parameters = list(net.parameters())

    def terms(
        self,
        penalties: Mapping[str, Penalty],
        given: Recomputable,
        step: int | None = None,
    ) -> tuple[Tensor, dict[str, Terms | None]]:
        """Return a loss and the terms of penalties on it, and count a step.

        The gradients of both are known when this returns; their backward hands them out to the
        shards, without FSDP, and the graph behind ``given.value`` is used up. ``.grad`` is
        untouched.

        Args:
            penalties: in the weights, by finite differences, by name.
            given: the loss ``[]`` of this process's samples, how it is computed anew (without a
                trace in logs and metrics; buffers and random numbers are seen to), and the state
                of the random numbers before it.
            step: the optimiser step; None counts the calls.

        Returns:
            The loss of this process, and terms by name, None for one that does not act on this
            step; norms and values are those of all processes. Where none acts, the loss is
            returned with its own graph.

        Raises:
            RuntimeError: if the loss has no graph, or no gradient arrives at the weights of one.
        """
        if not any(penalty.acts_at(step) for penalty in penalties.values()):
            for penalty in penalties.values():
                penalty.skip(step)
            return given.value, dict.fromkeys(penalties)
        if not given.value.requires_grad:
            raise RuntimeError(NO_GRAPH)
        epsilon = spacing(given.value, *graph.leaves(given.value))
        here = self.gradient(given.value)
        terms = {
            name: penalty.act_with(partial(self.term, penalty, given, here, epsilon), step)
            for name, penalty in penalties.items()
        }
        return known_gradient(given.value, list(here), zeros_for_none(here.values(), here)), terms

    def term(
        self, penalty: Any, given: Recomputable, here: Gradient, epsilon: float, weight: float
    ) -> Terms:
        """Return the terms of one penalty.

        Args:
            penalty: in the weights, by finite differences.
            given: the loss, and how it is computed anew.
            here: the gradient of the loss.
            epsilon: the spacing at one of the numbers that the loss is computed in.
            weight: the factor of the reduced value.

        Returns:
            The terms, G = 1.

        Raises:
            RuntimeError: if no gradient has arrived at its weights.
        """
        chosen = penalty.wrt.chosen(self.net)
        if all(here[x] is None for x in chosen):
            raise RuntimeError(
                "no gradient arrived at the sharded weights of a penalty: does the loss depend on "
                "them, and is set_requires_gradient_sync(True) on?"
            )

        def gradient(moves: list[Tensor] | None) -> list[Tensor]:
            if moves is None:
                return zeros_for_none(here.values(), here)
            with self.gathered_anew(), perturbed(shards(chosen), shards(moves)):
                again = isolated(given.function, given.state, given.value.device, twice=False)
                with torch.enable_grad(), again:
                    loss = given.function()
                return zeros_for_none(self.gradient(loss).values(), here)

        grads = zeros_for_none([here[x] for x in chosen], chosen)
        norm = penalty.form.norm
        n, slopes = penalty.estimator.slopes(chosen, grads, norm, epsilon, gradient, over_shards)
        n2 = known_gradient(n.square().reshape(1), list(here), slopes)
        return formula.terms(penalty, n2, weight, observe=True)

    def gradient(self, loss: Tensor) -> Gradient:
        """Return the gradient of a loss, averaged over the processes; ``.grad`` is untouched."""
        kept = {p: p.grad for p in self.parameters if p.requires_grad}
        for p in kept:
            p.grad = None
        try:
            with self.gathered_anew(), torch.autocast(loss.device.type, enabled=False):
                loss.backward()
            return {p: p.grad for p in kept}
        finally:
            for p, grad in kept.items():
                p.grad = grad

    @contextmanager
    def gathered_anew(self) -> Iterator[None]:
        """Free the gathered copies of the weights at the end: the next forward gathers its own."""
        try:
            yield
        finally:
            for module in self.net.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of each that lies on this process: the same memory."""
    return [t.detach().to_local() for t in tensors]  # type: ignore[attr-defined]


def over_shards(tensors: Sequence[Tensor], entry: Entry, reduce: str = "sum") -> Tensor:
    """Return the sum, or the maximum, of a function >= 0 of all entries on all processes.

    There is one all-reduce for each way in which the tensors are sharded.
    """
    together = torch.sum if reduce == "sum" else torch.amax
    ways: dict[Any, list[Tensor]] = {}
    for t, shard in zip(tensors, shards(tensors), strict=True):
        part = entry(widened(shard)).reshape(-1)
        part = together(torch.cat([part, part.new_zeros(1)]), 0)  # a shard may be empty
        ways.setdefault((t.device_mesh, t.placements), []).append(part)  # type: ignore[attr-defined]
    totals = []
    for (mesh, placements), parts in ways.items():
        over = [p if p.is_replicate() else Partial(reduce) for p in placements]
        here = DTensor.from_local(together(torch.stack(parts), 0), mesh, over, run_check=False)
        totals.append(here.full_tensor())
    return together(torch.stack(totals), 0)
