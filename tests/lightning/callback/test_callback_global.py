"""Two processes whose averaged gradient has one norm: as one process on the whole batch."""

import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from fits import LAMBDA, batches, callback, grouped, loader, penalty, train_pooled
from modules import QUIET, SGD, Plain
from nets import net
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.ddp

FITS = [(estimator, size) for estimator in ("exact", "difference") for size in (1, 2)]
LOOPS = ["exact", "difference", "with_loss"]


def share(micro, rank):
    """Every second sample of each micro-batch."""
    return [(x[rank :: ranks.RANKS], y[rank :: ranks.RANKS]) for x, y in micro]


def fitted(rank, estimator, size):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks.RANKS,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=1,
        accumulate_grad_batches=size,
        callbacks=[callback("weight", estimator, scope="global")],
        logger=False,
        **QUIET,
    )
    module = Plain(net())
    trainer.fit(module, loader(share(batches(), rank)))
    return list(module.parameters())


def looped(rank, kind):
    """Train in a loop of one's own, with torch's data parallelism."""
    parallel = DistributedDataParallel(net())
    optimizer = SGD(parallel.parameters())
    made = penalty("weight", "exact" if kind == "exact" else "difference", scope="global")
    for x, y in share(batches(), rank):

        def closure(x=x, y=y):
            return F.cross_entropy(parallel(x), y)

        optimizer.zero_grad()
        if kind == "exact":
            loss = closure()
            total = loss + made(loss, parallel.module)
        elif kind == "difference":
            total = closure() + made(closure, parallel.module)
        else:
            total = made.with_loss(closure, parallel.module)
        total.backward()
        optimizer.step()
    return list(parallel.parameters())


def of_rank(rank):
    return {case: fitted(rank, *case) for case in FITS} | {k: looped(rank, k) for k in LOOPS}


@pytest.fixture(scope="module")
def trained():
    return ranks.run(of_rank)


def check(found, true):
    first, second = found
    for mine, other, alone in zip(first, second, true.parameters(), strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("estimator", "size"), FITS)
def test_a_fit_equals_one_process_on_the_whole_batch(trained, estimator, size):
    true = train_pooled(net(), grouped(batches(), size), LAMBDA, estimator)
    check([rank[estimator, size] for rank in trained], true)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_equals_one_process_on_the_whole_batch(trained, kind):
    estimator = "exact" if kind == "exact" else "difference"
    check([r[kind] for r in trained], train_pooled(net(), grouped(batches(), 1), LAMBDA, estimator))
