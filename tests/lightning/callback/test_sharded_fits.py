"""Fits on two processes with FSDP2: trained weights, logs, and what is refused."""

import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from modules import QUIET
from pytorch_lightning.strategies import ModelParallelStrategy
from sharding import SGD, STEPS, B, data, pair, sharded, single, slope, whole
from torch.utils.data import DataLoader, Subset, TensorDataset

import gpkit
from gpkit.autodiff.sharding.gathering import is_sharded

pytestmark = pytest.mark.ddp


class ShardsItself(pl.LightningModule):
    """A module that knows nothing of penalties; it logs, and shards itself."""

    steps = 0  # of all of them

    def __init__(self):
        super().__init__()
        self.net = single()

    def configure_model(self):
        if not is_sharded(self):
            sharded(self.net)

    def training_step(self, batch, batch_idx):
        ShardsItself.steps += 1
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self):
        return SGD(self.parameters())


def fit(rank, penalty=None):
    """Train with Lightning's own strategy and gpkit's callback, the gradient clipped."""
    module = ShardsItself()
    part = Subset(TensorDataset(*data(torch.float32)), range(rank, STEPS * B, ranks.RANKS))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks.RANKS,
        strategy=ModelParallelStrategy(data_parallel_size=ranks.RANKS, tensor_parallel_size=1),
        use_distributed_sampler=False,
        max_epochs=1,
        gradient_clip_val=0.3,
        logger=False,
        log_every_n_steps=1,
        **QUIET,
        callbacks=[gpkit.GradientPenaltyCallback(penalty or pair(step=0.1)[0])],
    )
    trainer.fit(module, DataLoader(part, B // ranks.RANKS))
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {"net": whole(module.net), "logged": logged}


def fit_refused(rank):
    """What is said at the start of fits with penalties that FSDP cannot have, before any step."""
    said, steps = [], ShardsItself.steps
    for penalty in (gpkit.weight_grad_norm(), gpkit.curvature(estimator="taylor")):
        try:
            fit(rank, penalty)
        except ValueError as error:
            said.append(str(error))
    assert ShardsItself.steps == steps
    return said


def fits(rank):
    each = {every: fit(rank, pair(step=0.1, every=every)[0]) for every in EVERY}
    return each | {"refused": fit_refused(rank)}


@pytest.fixture(scope="module")
def fitted():
    """What each process has at the end of its fits."""
    return ranks.run(fits)


EVERY = (1, 2)


def fitted_by_hand(every):
    """Train on one process; return the net, and its last loss on each share, penalty and norm."""
    net = single()
    params, optimizer = list(net.parameters()), SGD(net.parameters())
    x, y = data(torch.float32)
    for step in range(STEPS):
        x_, y_ = (t[step * B :][:B] for t in (x, y))

        def again(x=x_, y=y_):
            return torch.autograd.grad(F.mse_loss(net(x), y), params)

        base = again()
        slopes, n = slope(base, params, [True] * 6, again, "l2", 0.1, "forward", torch.float32)
        weight = 0.0 if step % every else 0.1 * every
        shares = [(x_[rank :: ranks.RANKS], y_[rank :: ranks.RANKS]) for rank in range(ranks.RANKS)]
        losses = [F.mse_loss(net(x), y).item() for x, y in shares]
        last = losses, weight, (weight * n**2).item(), n.item()
        total = [g + weight * 2 * n * s for g, s in zip(base, slopes, strict=True)]
        length = torch.cat([t.reshape(-1) for t in total]).norm()
        assert length > 0.3  # or nothing is clipped
        for p, t in zip(params, total, strict=True):
            p.grad = t * (0.3 / (length + 1e-6))
        optimizer.step()
    return net, last


@pytest.mark.parametrize("every", EVERY)
def test_a_sharded_fit_trains_as_one_process(fitted, every):
    net, _ = fitted_by_hand(every)
    for known in fitted:
        torch.testing.assert_close(known[every]["net"], net.state_dict(), rtol=1e-6, atol=1e-6)


def test_a_sharded_fit_logs_the_penalty_of_the_whole_batch(fitted):
    """And the loss of this process's own share, as of everything else that a step logs."""
    _, (losses, weight, value, n) = fitted_by_hand(1)
    for known, loss in zip(fitted, losses, strict=True):
        assert known[1]["logged"] == pytest.approx(
            {
                "loss": loss,
                "train/loss_total": loss + value,
                "penalty/penalty": value,
                "penalty/penalty/weight": weight,
                "penalty/penalty/norm": n,
            },
            rel=1e-5,
        )


def test_a_fit_is_refused_with_what_to_use(fitted):
    for known in fitted:
        weight, inputs = known["refused"]
        assert "the trained shards are not in the graph that double backprop goes" in weight
        assert "got scope='batch': use scope='global'" in weight
        assert "Taylor series do not pass through its hooks" in inputs
