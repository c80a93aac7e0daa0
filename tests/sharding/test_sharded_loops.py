"""Loops on two processes with FSDP2: the weights are those of one process, trained by hand.

The table of docs/fsdp.md is printed at the end of the run.
"""

import pytest
import ranks
import sharded_critics
from sharded_critics import CASES, Critic, expected

pytestmark = pytest.mark.ddp


def of_rank(rank):
    found = {}
    for name in CASES:
        try:
            found[name] = sharded_critics.trained(rank, name)
        except Exception as error:
            found[name] = repr(error)
    return found


@pytest.fixture(scope="module")
def found():
    return ranks.run(of_rank)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(name, found, record_property):
    true, start = expected(CASES[name]), Critic().parameters()
    worst = 0.0
    for of_rank in found:
        assert not isinstance(of_rank[name], str), of_rank[name]
        weights, kinds = of_rank[name]
        assert kinds == {"DTensor"}  # sharded again after each backward pass
        worst = max(
            worst, *((a - b).abs().max().item() for a, b in zip(weights, true, strict=True))
        )
    record_property("sharded", (name, worst))
    assert worst <= CASES[name].tolerance
    assert max((a - b).abs().max() for a, b in zip(start, true, strict=True)) > 0.05
