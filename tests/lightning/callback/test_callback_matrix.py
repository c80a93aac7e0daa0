"""The callback against loops by hand, for every place, estimator, precision and strategy.

The largest parameter differences are printed, cell by cell, at the end of the run.
"""

import by_hand
import matrix
import nets
import pytest
import ranks
import torch
import torch.nn.functional as F
from modules import Plain

TOLERANCE = {"64": 1e-12}  # of parameters after several optimiser steps; in the others 1e-6

# torch's own: static_graph with a first optimiser step of several micro-batches, penalty or not.
TORCH = [c for c in matrix.CELLS if (c.strategy, c.accumulate) == ("static_graph", "2")]
DDP = [c for c in matrix.CELLS if c.strategy != "one"]
ASSERTION = "INTERNAL ASSERT FAILED"


def marked(cells):
    return [pytest.param(c, id=str(c), marks=[pytest.mark.slow] * matrix.is_slow(c)) for c in cells]


def test_every_pair_of_choices_runs_by_default():
    def pairs(cells):
        return set().union(*map(matrix.pairs, cells))

    tensors = [c for c in DDP if c.returns == "tensor"]
    assert pairs(c for c in tensors if not matrix.is_slow(c)) == pairs(tensors)


def of_rank(rank, cells):
    """Return the parameters of each cell as this process trains them, or what torch raised."""
    return {cell: outcome(matrix.trained, cell) for cell in cells} | {"plain": outcome(plain)}


def outcome(train, *args):
    try:
        return train(*args)
    except RuntimeError as error:
        return str(error)


def plain():
    """Train a cell that torch refuses without the callback."""
    matrix.trainer(TORCH[0], callbacks=[]).fit(
        Plain(nets.net(torch.float32)), matrix.Shares(ranks=2)
    )


@pytest.fixture(scope="module")
def trained(request):
    """Return what each process found of the cells that this session asks for."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    cells = [spec.params["cell"] for spec in asked if spec and "cell" in spec.params]
    return ranks.run(of_rank, [c for c in cells if c in DDP])


def check(cell, record_property, *found):
    """Hold the parameters of each process against those by hand."""
    true = matrix.expected(cell)
    start = nets.net(true[0].dtype).parameters()
    assert matrix.difference(start, true) > 0.05  # what the differences are small beside
    worst = max(matrix.difference(mine, true) for mine in found)
    record_property("cell", (str(cell), worst))
    assert worst <= TOLERANCE.get(cell.precision, 1e-6)  # NaN is not


@pytest.mark.parametrize("cell", marked(c for c in matrix.CELLS if c.strategy == "one"))
def test_one_process(cell, record_property):
    check(cell, record_property, matrix.trained(cell))


@pytest.mark.ddp
@pytest.mark.parametrize("cell", marked(c for c in DDP if c not in TORCH))
def test_two_processes(cell, record_property, trained):
    first, second = (rank[cell] for rank in trained)
    assert not isinstance(first, str), first
    check(cell, record_property, first, second)
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.ddp
@pytest.mark.parametrize("cell", marked(TORCH))
def test_what_torch_refuses_it_refuses_without_the_callback(cell, record_property, trained):
    record_property("cell", (str(cell), "torch"))
    for rank in trained:
        assert ASSERTION in rank[cell]
        assert ASSERTION in rank["plain"]


@pytest.mark.parametrize("kind", by_hand.TOTALS, ids="-".join)
def test_each_penalty_moves_what_is_trained(kind):
    cell = next(c for c in matrix.CELLS if (c.where, c.estimator) == kind)
    without = matrix.expected(cell, lambda net, x, y, *_: F.cross_entropy(net(x), y))
    assert matrix.difference(without, matrix.expected(cell)) > 1e-2
