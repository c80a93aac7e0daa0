"""Penalties in the weights under FSDP2, where every process holds a shard of each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from gpkit import graphs
from gpkit.calls import Computed
from gpkit.differences import SIGNS, finite_difference, spacing
from gpkit.environments import EnvironmentPenalty
from gpkit.isolation import isolated
from gpkit.penalty import GradientPenalty
from gpkit.perturbation import known_gradient, perturbed
from gpkit.targets import wide
from gpkit.terms import Terms
from gpkit.variables import weights

Entry = Callable[[Tensor], Tensor]
Gradient = Mapping[Tensor, Tensor | None]  # of every trained weight; None where nothing arrived


def is_sharded(net: nn.Module) -> bool:
    """Return whether FSDP2's ``fully_shard`` was applied to a module or to one inside of it.

    >>> is_sharded(nn.Linear(2, 1))
    False
    """
    return any(isinstance(module, FSDPModule) for module in net.modules())


def refusals(net: nn.Module, penalties: Mapping[str, GradientPenalty]) -> list[str]:
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
        if isinstance(penalty, EnvironmentPenalty):
            continue  # it differentiates in the logits, not through the net
        if not isinstance(penalty.estimator, finite_difference):
            kind = type(penalty.estimator).__name__
            found.append(
                f"{here} double backprop needs the gathered weights twice, and FSDP frees them "
                f"after one backward; got {kind}(): use estimator='finite_difference', or DDP"
            )
        if not isinstance(penalty.wrt, weights):
            continue
        if penalty.of not in ("loss", "output"):
            found.append(f"{here} of='loss' was expected; got of={penalty.of!r}: use DDP")
        if penalty.scope != "global":
            found.append(
                f"{here} gradients arrive averaged over the processes; got scope={penalty.scope!r}:"
                " use scope='global', or DDP"
            )
        if hasattr(penalty.weight, "measure"):
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
        given = Computed(closure(), closure, before)
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
        penalties: Mapping[str, GradientPenalty],
        given: Computed,
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
        factors = {name: penalty.count_step(step) for name, penalty in penalties.items()}
        terms: dict[str, Terms | None] = dict.fromkeys(penalties)
        if not any(factors.values()):
            return given.value, terms
        if not given.value.requires_grad:
            raise RuntimeError(
                "the penalty has nothing to differentiate: the loss has no graph. Was it computed "
                "under no_grad, or detached?"
            )
        epsilon = spacing(given.value, *graphs.leaves(given.value))
        here = self.gradient(given.value)
        for name, weight in factors.items():
            if weight:
                terms[name] = self.term(penalties[name], weight, given, here, epsilon)
        return known_gradient(given.value, list(here), known(here, here)), terms

    def term(
        self,
        penalty: GradientPenalty,
        weight: float,
        given: Computed,
        here: Gradient,
        epsilon: float,
    ) -> Terms:
        """Return the terms of one penalty, whose factor is ``weight``.

        Args:
            penalty: in the weights, by finite differences.
            weight: λ on this step, not zero.
            given: the loss, and how it is computed anew.
            here: the gradient of the loss.
            epsilon: the spacing at one of the numbers that the loss is computed in.

        Returns:
            The terms, G = 1.

        Raises:
            RuntimeError: if no gradient has arrived at its weights.
        """
        wrt, difference = penalty.wrt, penalty.estimator
        assert isinstance(wrt, weights)
        assert isinstance(difference, finite_difference)
        chosen = wrt.chosen(self.net)
        if all(here[x] is None for x in chosen):
            raise RuntimeError(
                "no gradient arrived at the sharded weights of a penalty: does the loss depend on "
                "them, and is set_requires_gradient_sync(True) on?"
            )
        n, directions = steepest(known(here, chosen), penalty.form.norm)
        size = length_of(chosen) / sum(x.numel() for x in chosen) ** 0.5
        length = length_of(directions)
        h = difference.length(size, epsilon) / torch.where(length > 0, length, 1)

        def along(sign: float) -> list[Tensor]:
            if sign == 0:
                return known(here, here)
            moves = [(h * sign * v).to(x.dtype) for x, v in zip(chosen, directions, strict=True)]
            with self.gathered_anew(), perturbed(shards(chosen), shards(moves)):
                again = isolated(given.function, given.state, given.value.device, twice=False)
                with torch.enable_grad(), again:
                    loss = given.function()
                return known(self.gradient(loss), here)

        a, b = SIGNS[difference.side]
        factor = 2 * n / ((b - a) * h)
        pairs = zip(along(a), along(b), strict=True)
        slopes = [(after.to(wide(after)) - before) * factor for before, after in pairs]
        n2 = known_gradient(n.square().reshape(1), list(here), slopes)
        penalty.form.observe(n2)
        values = penalty.form(n2)
        terms = Terms(n2, values, weight, penalty.total(values))
        penalty.observe(terms)
        return terms

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


def known(gradient: Gradient, xs: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of a gradient in some weights, zeros where there are none."""
    pairs = [(x, gradient[x]) for x in xs]
    return [torch.zeros_like(x.detach()) if g is None else g for x, g in pairs]


def shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of each that lies on this process: the same memory."""
    return [t.detach().to_local() for t in tensors]  # type: ignore[attr-defined]


def steepest(grads: Sequence[Tensor], norm: str) -> tuple[Tensor, list[Tensor]]:
    """Return n, one number, and v with ⟨g, v⟩ = n: the gradient over it, or the dual direction.

    Where several entries are the largest, the dual direction of "linf" is spread over them.
    """
    grads = [g.to(wide(g)) for g in grads]
    if norm == "l2":
        n = length_of(grads)
        return n, [g * torch.where(n == 0, n, 1 / n) for g in grads]
    if norm == "l1":
        return over_all(grads, torch.abs), [g.sign() for g in grads]
    n = over_all(grads, torch.abs, "max")
    largest = [g.sign() * (g.abs() == n) for g in grads]
    count = over_all(largest, torch.abs)
    return n, [v / count.clamp(min=1) for v in largest]


def length_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean length of all tensors together: one number."""
    return over_all(tensors, torch.square).sqrt()


def over_all(tensors: Sequence[Tensor], entry: Entry, reduce: str = "sum") -> Tensor:
    """Return the sum, or the maximum, of a function >= 0 of all entries on all processes.

    There is one all-reduce for each way in which the tensors are sharded.
    """
    together = torch.sum if reduce == "sum" else torch.amax
    ways: dict[Any, list[Tensor]] = {}
    for t, shard in zip(tensors, shards(tensors), strict=True):
        part = entry(shard.to(wide(shard))).reshape(-1)
        part = together(torch.cat([part, part.new_zeros(1)]), 0)  # a shard may be empty
        ways.setdefault((t.device_mesh, t.placements), []).append(part)  # type: ignore[attr-defined]
    totals = []
    for (mesh, placements), parts in ways.items():
        partial = [p if p.is_replicate() else Partial(reduce) for p in placements]
        here = DTensor.from_local(together(torch.stack(parts), 0), mesh, partial, run_check=False)
        totals.append(here.full_tensor())
    return together(torch.stack(totals), 0)
