"""Penalties in the weights under FSDP2, where every process holds a shard of each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from gpkit import graphs
from gpkit.differences import SIGNS, finite_difference, spacing
from gpkit.forms import root
from gpkit.isolation import isolated
from gpkit.penalty import GradientPenalty
from gpkit.perturbation import known_gradient, perturbed
from gpkit.targets import wide
from gpkit.terms import Terms
from gpkit.variables import Computed, weights

Entry = Callable[[Tensor], Tensor]


def is_sharded(net: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` was applied to a module or to one inside of it."""
    return any(isinstance(module, FSDPModule) for module in net.modules())


def refusals(net: nn.Module, penalties: Mapping[str, GradientPenalty]) -> list[str]:
    """Return what stands in the way of penalties on a sharded net: a line for each finding.

    FSDP2 computes with copies of the weights that it gathers and frees again, so that the shards
    which are trained are in no graph: there is nothing to differentiate twice. Gradients arrive at
    them averaged over all processes, and that average is all that a penalty can see.

    Args:
        net: a module to which, or inside of which, ``fully_shard`` was applied.
        penalties: by name.

    Returns:
        The findings; none if all is well.
    """
    found = []
    for name, penalty in penalties.items():
        here, wrt = f"penalty {name!r} under FSDP:", type(penalty.wrt).__name__
        if not isinstance(penalty.wrt, weights):
            found.append(f"{here} a penalty in the weights was expected; got wrt={wrt}: use DDP")
        elif not isinstance(penalty.estimator, finite_difference):
            found.append(
                f"{here} the sharded weights are in no graph to differentiate twice; got "
                f"estimator={type(penalty.estimator).__name__}(): use "
                "estimator='finite_difference', or DDP"
            )
        if penalty.of not in ("loss", "output"):
            found.append(f"{here} of='loss' was expected; got of={penalty.of!r}: use DDP")
        if penalty.scope == "sample":
            found.append(
                f"{here} gradients arrive averaged over all processes; got scope='sample': use "
                "scope='global', or DDP"
            )
        if hasattr(penalty.weight, "measure"):
            found.append(
                f"{here} a number or a schedule was expected; got "
                f"weight={type(penalty.weight).__name__}(): use a number"
            )
    whole = [
        n for n, p in net.named_parameters() if p.requires_grad and not isinstance(p, DTensor)
    ]
    if whole:
        found.append(
            f"under FSDP all trained parameters must be sharded; {', '.join(whole)} would not be "
            "averaged over the processes: apply fully_shard to a module that holds them"
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
    all-reduce of a few numbers.

    Args:
        net: a module to which, or inside of which, ``fully_shard`` was applied.
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
            given: the loss ``[]`` of this process's samples, how it is computed anew, and the state
                of the random numbers before it.
            step: the optimiser step; None counts the calls.

        Returns:
            The loss of this process, and terms by name, None for one that does not act on this
            step; norms and values are those of all processes. Where none acts, the loss is
            returned with its own graph.

        Raises:
            RuntimeError: if no gradient arrives at the weights of a penalty.
        """
        factors = {name: penalty.count_step(step) for name, penalty in penalties.items()}
        terms: dict[str, Terms | None] = dict.fromkeys(penalties)
        if not any(factors.values()):
            return given.value, terms
        trained = [p for p in self.parameters if p.requires_grad]
        epsilon = spacing(given.value, *graphs.leaves(given.value))
        here = self.gradient(given.value, trained)
        for name, weight in factors.items():
            if weight:
                terms[name] = self.term(penalties[name], weight, given, trained, here, epsilon)
        return known_gradient(given.value, trained, known(here, trained)), terms

    def term(
        self,
        penalty: GradientPenalty,
        weight: float,
        given: Computed,
        trained: list[nn.Parameter],
        here: list[Tensor | None],
        epsilon: float,
    ) -> Terms:
        """Return the terms of one penalty, given the gradient of the loss."""
        assert isinstance(penalty.estimator, finite_difference)
        difference = penalty.estimator
        chosen = penalty.wrt.chosen(self.net)
        places = [next(i for i, p in enumerate(trained) if p is x) for x in chosen]
        if all(here[i] is None for i in places):
            raise RuntimeError(
                "no gradient arrived at the sharded weights of a penalty: does the loss depend on "
                "them, and is set_requires_gradient_sync(True) on?"
            )
        grads = [known(here, trained)[i] for i in places]
        n, directions = steepest(grads, penalty.form.norm)
        moving = length_of(directions)
        h = difference.length(length_of(chosen) / sum(x.numel() for x in chosen) ** 0.5, epsilon)
        h = h / torch.where(moving > 0, moving, torch.ones_like(moving))

        def along(sign: float) -> list[Tensor]:
            if sign == 0:
                return known(here, trained)
            moves = [(h * sign * v).to(x.dtype) for x, v in zip(chosen, directions, strict=True)]
            with self.gathered_anew(), perturbed(shards(chosen), shards(moves)):
                again = isolated(given.function, given.state, given.value.device, twice=False)
                with torch.enable_grad(), again:
                    loss = given.function()
                return known(self.gradient(loss, trained), trained)

        a, b = SIGNS[difference.side]
        factor = 2 * n / ((b - a) * h)
        pairs = zip(along(a), along(b), strict=True)
        slopes = [(after - before).to(wide(after)) * factor for before, after in pairs]
        n2 = known_gradient(n.square().reshape(1), trained, slopes)
        norms = root(n2).detach()
        penalty.form.observe(norms)
        values = penalty.form(n2)
        penalty.observe(norms)
        return Terms(norms, values, weight, weight * penalty.total(values))

    def gradient(self, loss: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradient of a loss, averaged over the processes; ``.grad`` is untouched."""
        kept = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        try:
            with self.gathered_anew(), torch.autocast(loss.device.type, enabled=False):
                loss.backward()
            return [p.grad for p in trained]
        finally:
            for p, grad in zip(trained, kept, strict=True):
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


def known(grads: Sequence[Tensor | None], xs: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients with zeros where there are none."""
    pairs = zip(grads, xs, strict=True)
    return [torch.zeros_like(x.detach()) if g is None else g for g, x in pairs]


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
