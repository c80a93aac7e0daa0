"""Two processes: each penalises its own gradient and draws its own points; results are averaged."""

import copy
import pickle
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import gpkit
from gpkit.presets import PRESETS

B, RANKS = 4, 2
SGD = partial(torch.optim.SGD, lr=0.05)


class Halves(pl.LightningDataModule):
    """Every second sample for each process."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(24, 5, generator=rng, dtype=torch.float64)
        self.data = TensorDataset(x, x[:, :1] ** 2)

    def part(self, rank):
        return DataLoader(Subset(self.data, range(rank, 24, RANKS)), B)

    def train_dataloader(self):
        return self.part(self.trainer.global_rank)

    val_dataloader = train_dataloader


class Witness(nn.Sequential):
    """Layers that keep a record of where they are evaluated in training."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach().clone())
        return super().forward(x)


class Save(pl.Callback):
    """Write what a process knows at its end."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        known = {"seen": module.net.seen, "net": module.net.state_dict()}
        known["logged"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
        torch.save(known, self.folder / f"{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Witness(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()


@pytest.fixture(scope="module")
def ranks(net, tmp_path_factory):
    """Train on two processes; return what each knows at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    penalty = {"weight": gpkit.weight_grad_norm(0.1), "line": gpkit.wgan_gp(2.0, center=0.7)}
    module = gpkit.PenalizedModule(copy.deepcopy(net), F.mse_loss, penalty, optimizer=SGD)
    runner = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp_spawn",
        use_distributed_sampler=False,
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Save(folder)],
    )
    runner.fit(module, Halves())
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def by_hand(net, points):
    """Average the gradients of each half's loss with its own penalties; torch.autograd only."""
    net = nn.Sequential(*copy.deepcopy(net))
    params, data = list(net.parameters()), Halves()
    optimizer = SGD(params)
    batches = zip(*(data.part(rank) for rank in range(RANKS)), strict=True)
    for step, halves in enumerate(batches):
        optimizer.zero_grad()
        for rank, (x, y) in enumerate(halves):
            loss = F.mse_loss(net(x), y)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            z = points[rank][step].requires_grad_()
            (slopes,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
            total = loss + 0.1 * sum(g.square().sum() for g in grads)
            total = total + 2.0 * (slopes.norm(dim=1) - 0.7).square().mean()
            (total / RANKS).backward()
        optimizer.step()
    return net


def test_trains_as_averaging_the_gradients_of_the_halves(net, ranks):
    true = by_hand(net, [known["seen"][1::2] for known in ranks]).state_dict()
    for known in ranks:
        torch.testing.assert_close(known["net"], true, rtol=1e-9, atol=1e-12)


def test_each_process_draws_its_own_points(ranks):
    alphas = []
    for known in ranks:
        x, points = torch.cat(known["seen"][::2]), torch.cat(known["seen"][1::2])
        fake = torch.cat([batch.roll(1, 0) for batch in known["seen"][::2]])
        alphas.append(((points - fake) / (x - fake))[:, 0])
    assert len(torch.cat(alphas).unique()) == 24  # one for each sample of each process


def test_validation_is_averaged_over_the_processes(ranks):
    trained = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    trained.load_state_dict(ranks[0]["net"])
    x, y = Halves().data.tensors
    output = trained(x).detach()
    for known in ranks:
        assert known["logged"]["val/loss"] == pytest.approx(F.mse_loss(output, y).item())
        assert known["logged"]["val/mae"] == pytest.approx(F.l1_loss(output, y).item())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_module_goes_to_another_process(net, preset):
    module = gpkit.PenalizedModule(net, nn.MSELoss(), PRESETS[preset]())
    copied = pickle.loads(pickle.dumps(module))
    assert repr(copied.penalties) == repr(module.penalties)
