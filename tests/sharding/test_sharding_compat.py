"""What gpkit takes of FSDP2 beside its public API is there.

A test that fails here names the entry of gpkit/autodiff/sharding/compat.py that a release has
changed, and what goes wrong in gpkit without it.
"""

import inspect

import pytest
import ranks
from releases import require
from sharded_critics import Critic, data, half, sharded

from gpkit.autodiff import graph
from gpkit.autodiff.sharding import compat

pytestmark = pytest.mark.ddp

LOUD = 'penalties of sharded nets raise torch\'s error about a "storage of size 0"'
ENTRIES = {
    "states": f"no module is found: {LOUD}",
    "groups_of": f"modules have no parameters: {LOUD}",
    "gathered_of": f"a module whose input has no gradient is not found in a graph: {LOUD}",
    "modules_in": f"frozen modules are not found in a graph: {LOUD}",
    "manages": "exact penalties in sharded weights are not refused by name",
    "as_in_graphs": "PenalizedModule logs a gradient norm of zero",
    "begin_backward": "a penalty raises AttributeError in the backward pass",
    "Resharding": "gpkit.unsharded raises AttributeError",
}


def there(rank):
    critic, (real, _) = sharded(Critic()), data()
    critic.blocks[1].requires_grad_(False)
    params = list(critic.parameters())
    y = critic(half(real[0], rank).requires_grad_()).sum()
    known = list(compat.states())
    mine = [groups for module, _, groups in known if module in set(critic.modules())]
    leaves = {id(leaf) for leaf in graph.leaves(y)}
    whole = [p for groups in mine for group in groups for p in compat.gathered_of(group)]
    state = known[0][1]
    before = compat.Resharding(critic.modules()).before
    return {
        "states": len(mine) == 4,
        "groups_of": all(len(groups) == 1 and groups[0].fsdp_params for groups in mine),
        "gathered_of": len(whole) == len(params) and len(leaves & set(map(id, whole))) > 4,
        "modules_in": critic.blocks[1] in compat.modules_in(y),
        "manages": compat.manages(params[:1]) and compat.manages(whole[:1]),
        "as_in_graphs": leaves >= {id(p) for p in compat.as_in_graphs(params) if p.requires_grad},
        "begin_backward": "grad" in inspect.signature(state._pre_backward).parameters,
        "Resharding": len(before) == 4
        and [backward for _, _, backward, _ in before] == [True] * 4
        and hasattr(state, "_is_root")
        and hasattr(state, "_auto_reshard_after_forward"),
    }


@pytest.fixture(scope="module")
def found():
    return ranks.run(there)


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry(entry, found):
    for on_rank in found:
        require(on_rank[entry], entry, ENTRIES[entry])


def test_every_entry_is_tested():
    own = {
        name
        for name, value in vars(compat).items()
        if getattr(value, "__module__", "") == compat.__name__
    }
    assert own - {"is_fsdp2"} == set(ENTRIES)  # is_fsdp2 asks for a public method
