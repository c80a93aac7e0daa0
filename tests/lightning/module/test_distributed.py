"""Two processes: each penalises its own gradient and draws its own points; results are averaged."""

import copy
import pickle
from functools import partial

import by_hand
import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from modules import QUIET
from nets import Witness
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import gpkit
from gpkit.presets import PRESETS

pytestmark = pytest.mark.ddp

B = 4
SGD = partial(torch.optim.SGD, lr=0.05)


class Halves(pl.LightningDataModule):
    """Every second sample for each process."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(24, 5, generator=rng, dtype=torch.float64)
        self.data = TensorDataset(x, x[:, :1] ** 2)

    def part(self, rank):
        return DataLoader(Subset(self.data, range(rank, 24, ranks.RANKS)), B)

    def train_dataloader(self):
        return self.part(self.trainer.global_rank)

    val_dataloader = train_dataloader


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Witness(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def fitted(rank, module):
    """Train a module that came from another process; return what this one knows at the end."""
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "logger": False, "accelerator": "cpu"}
    options |= {"devices": ranks.RANKS, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = pl.Trainer(**options, **QUIET)
    trainer.fit(module, Halves())
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {"seen": module.net.seen, "net": module.net.state_dict(), "logged": logged}


@pytest.fixture(scope="module")
def found(net):
    penalty = {"weight": gpkit.weight_grad_norm(0.1), "line": gpkit.wgan_gp(2.0, center=0.7)}
    module = gpkit.PenalizedModule(copy.deepcopy(net), F.mse_loss, penalty, optimizer=SGD)
    return ranks.run(fitted, module)


def trained_by_hand(net, points):
    """Average the gradients of each half's loss with its own penalties."""
    points = iter([z for step in zip(*points, strict=True) for z in step])

    def total(net, x, y, weight, scale):
        loss = F.mse_loss(net(x), y)
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        z = next(points).requires_grad_()
        (slopes,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
        penalty = 0.1 * by_hand.squares(grads)
        return loss + penalty + 2.0 * (slopes.norm(dim=1) - 0.7).square().mean()

    batches = zip(*(Halves().part(rank) for rank in range(ranks.RANKS)), strict=True)
    return by_hand.train(nn.Sequential(*net), batches, total, None, SGD, windows=[1] * 3)


def test_trains_as_averaging_the_gradients_of_the_halves(net, found):
    true = trained_by_hand(net, [known["seen"][1::2] for known in found]).state_dict()
    for known in found:
        torch.testing.assert_close(known["net"], true, rtol=1e-9, atol=1e-12)


def test_each_process_draws_its_own_points(found):
    alphas = []
    for known in found:
        x, points = torch.cat(known["seen"][::2]), torch.cat(known["seen"][1::2])
        fake = torch.cat([batch.roll(1, 0) for batch in known["seen"][::2]])
        alphas.append(((points - fake) / (x - fake))[:, 0])
    assert len(torch.cat(alphas).unique()) == 24  # one for each sample of each process


def test_validation_is_averaged_over_the_processes(found):
    trained = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    trained.load_state_dict(found[0]["net"])
    x, y = Halves().data.tensors
    output = trained(x).detach()
    for known in found:
        assert known["logged"]["val/loss"] == pytest.approx(F.mse_loss(output, y).item())
        assert known["logged"]["val/mae"] == pytest.approx(F.l1_loss(output, y).item())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_module_goes_to_another_process(net, preset):
    module = gpkit.PenalizedModule(net, nn.MSELoss(), PRESETS[preset]())
    copied = pickle.loads(pickle.dumps(module))
    assert repr(copied.penalties) == repr(module.penalties)
