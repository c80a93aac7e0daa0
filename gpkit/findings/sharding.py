"""Checks of penalties on a net that FSDP2 has sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from gpkit.estimators.finite_difference import finite_difference
from gpkit.finding import Finding, error


def findings_of_sharding(
    net: nn.Module, penalties: Mapping[str, Any], needed: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield the reasons why penalties do not work on a sharded net.

    FSDP2 computes with gathered copies of the weights, so the trained shards are not in the graph.
    The only gradient in the weights that a penalty can get is the one that FSDP's backward leaves
    at the shards, averaged over the processes. Penalties in the inputs need none.

    Args:
        net: a module to which ``fully_shard`` was applied, or a submodule of which.
        penalties: by name.
        needed: what each needs of a forward pass.

    Yields:
        Each finding.
    """
    for name, penalty in penalties.items():
        for said in () if needed[name].environments else _of_penalty(penalty, needed[name]):
            yield replace(error("trainer", f"under FSDP, {said}"), penalty=name)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    whole = [n for n, p in trained if not isinstance(p, DTensor)]
    if whole:
        yield error(
            "trainer",
            "under FSDP every trained parameter must be sharded, or its gradient is not averaged "
            f"over the processes; not sharded are {', '.join(whole)}: apply fully_shard to their "
            "modules",
        )


def _of_penalty(penalty: Any, needs: Any) -> Iterator[str]:
    """Yield the reasons of one penalty that is no comparison of environments."""
    if needs.own_forward:
        yield f"got forward={penalty.forward!r}: leave it out, or use DDP"
    if needs.on_jets:
        yield ("Taylor series do not pass through its hooks: use estimator='projection' or 'exact'")
    if needs.measures:
        yield f"the weight {type(penalty.weight).__name__}() measures gradients, which needs DDP"
    if not needs.in_weights:
        return
    if not isinstance(penalty.estimator, finite_difference):
        kind = type(penalty.estimator).__name__
        yield (
            "the trained shards are not in the graph that double backprop goes through; got "
            f"{kind}(): use estimator='finite_difference', or DDP"
        )
    if penalty.of not in ("loss", "output"):
        yield f"of='loss' is needed; got of={penalty.of!r}: use DDP"
    if penalty.scope != "global":
        yield (
            f"gradients arrive averaged over the processes; got scope={penalty.scope!r}: use "
            "scope='global', or DDP"
        )
