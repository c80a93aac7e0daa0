"""All private API of FSDP2 that gpkit uses.

`torch.distributed.fsdp.FSDPModule` gathers and shards by public methods. It does not say which of
its modules a graph was made by, nor what is set for them: that is here. If a release of torch
removes an entry, `tests/sharding/test_sharding_compat.py` fails with its name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff import graph

STATES = "torch.distributed._composable_state"  # loaded with FSDP2; not loaded here


def is_fsdp2(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module; its class would take a second to import."""
    return hasattr(module, "set_reshard_after_backward")


def states() -> Iterator[tuple[Any, Any, list[Any]]]:
    """Yield each FSDP2 module of the process, with its state and its groups of parameters.

    The registry is the only way from a graph to its modules. It is empty in a process that does not
    use FSDP2.
    """
    registry = getattr(sys.modules.get(STATES), "_module_state_mapping", {})
    seen = set()
    for module, reference in list(registry.items()):
        state = reference()
        if id(state) not in seen and is_fsdp2(module):
            seen.add(id(state))  # several modules may have one state
            yield module, state, groups_of(state)


def groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters of a module's state; older releases have one or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]


def modules_in(y: Tensor) -> list[Any]:
    """Return the FSDP2 modules that were called in the graph of a tensor.

    A module is known by its gathered parameters, which are leaves of the graph, or, if they are
    frozen, by the node that FSDP2 puts at its input.

    Args:
        y: a tensor with a graph.
    """
    known = list(states())
    if not known:
        return []
    called = {id(getattr(node, "param_group", None)) for node in graph.nodes(y)}
    leaves = set(map(id, graph.leaves(y)))
    return [
        module
        for module, _, groups in known
        if any(id(g) in called or not leaves.isdisjoint(map(id, gathered_of(g))) for g in groups)
    ]


def gathered_of(group: Any) -> list[Tensor]:
    """Return the whole parameters of a group; their memory is freed while they are sharded."""
    found = (getattr(p, "_unsharded_param", None) for p in group.fsdp_params)
    return [p for p in found if p is not None]


def manages(parameters: Iterable[Tensor]) -> bool:
    """Whether FSDP2 manages one of some parameters, which are sharded or gathered now."""
    known = {
        id(p)
        for *_, groups in states()
        for group in groups
        for p in (*gathered_of(group), *(param.sharded_param for param in group.fsdp_params))
    }
    return bool(known) and any(id(p) in known for p in parameters)


def as_in_graphs(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters as the graphs of forward passes have them: whole, if FSDP2 shards them."""
    whole = {
        id(param.sharded_param): param._unsharded_param
        for *_, groups in states()
        for group in groups
        for param in group.fsdp_params
        if hasattr(param, "_unsharded_param")
    }
    return [whole.get(id(p), p) for p in parameters]


def begin_backward(module: Any) -> None:
    """Do what the hook at the output of an FSDP2 module does when a backward pass reaches it.

    It gathers the weights, and has them sharded and their gradients reduced at the end of the pass.
    ``unshard()``, which is public, gathers alone. It can only be called in a backward pass.

    Args:
        module: an FSDP2 module.
    """
    module._get_fsdp_state()._pre_backward(None)


class Resharding:
    """Whether the parameters of modules are sharded again after a forward and a backward pass.

    FSDP2 has methods to set both, and none to read them.

    Args:
        modules: FSDP2 modules.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        chosen = {id(module) for module in modules}
        self.found = [(m, s, groups) for m, s, groups in states() if id(m) in chosen]
        self.before = [
            (group, state, group.reshard_after_backward, group.post_forward_mesh_info)
            for _, state, groups in self.found
            for group in groups
        ]
        self.began = {id(state): state._is_root is not None for _, state, _ in self.found}

    def disable(self) -> None:
        """Keep the parameters gathered, once they are."""
        for group, *_ in self.before:
            group.reshard_after_backward, group.post_forward_mesh_info = False, None

    def restore(self) -> None:
        """Set what was set before, and shard the parameters unless they were to stay gathered."""
        for group, state, backward, forward in self.before:
            group.reshard_after_backward = backward
            # In the first forward pass of all, FSDP2 lets the root stay gathered after a forward.
            became_root = state._is_root and not self.began[id(state)]
            if not (became_root and state._auto_reshard_after_forward):
                group.post_forward_mesh_info = forward
        for module, _, groups in self.found:
            if all(group.reshard_after_backward for group in groups):
                module.reshard()

    def reset(self) -> None:
        """Let FSDP2 forget a forward or backward pass that an exception has ended."""
        for module, state, _ in self.found:
            if state._is_root and hasattr(module, "reset_iter_state"):  # newer releases
                module.reset_iter_state()
