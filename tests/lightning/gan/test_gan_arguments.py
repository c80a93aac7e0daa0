"""Nets, batches and losses that a GANModule takes, and those that it refuses."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gan_by_hand import LOSSES
from gans import R1, B, D, assert_same, critic, data, generator, module, same, trainer
from loggers import Record
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit
from gpkit.lightning.gan import GANModule
from gpkit.lightning.gan.losses import GANLoss
from gpkit.lightning.gan.support import require_support


@pytest.mark.parametrize("shape", ["[B]", "[B, 1]", "maps"])
@pytest.mark.parametrize("loss", LOSSES)
def test_scores_of_any_shape(shape, loss):
    ends = {"[B]": nn.Flatten(0), "[B, 1]": nn.Flatten(1), "maps": nn.Identity()}
    grid = (3, 3) if shape == "maps" else (4, 4)
    C = nn.Sequential(nn.Conv2d(1, 2, 2), nn.SiLU(), nn.Conv2d(2, 1, grid[0]), ends[shape])
    G = nn.Sequential(nn.Linear(3, 25), nn.Unflatten(1, (1, 5, 5)))
    of = (lambda s: s.flatten(1).mean(1)) if shape == "maps" else "output"
    made = module(G, C, loss=loss, penalty={"gp": gpkit.wgan_gp(of=of), "r1": gpkit.r1(of=of)})
    before = copy.deepcopy(made.state_dict())
    record = Record()
    options = {"max_epochs": 1, "log_every_n_steps": 2, "logger": record}
    trainer(**options).fit(made, DataLoader(torch.rand(8, 1, 5, 5), 4))
    assert not same(made.state_dict(), before)
    assert record.rows[0]["slope/real"] > 0
    scores = C(torch.rand(4, 1, 5, 5))
    assert list(scores.shape) == {"[B]": [4], "[B, 1]": [4, 1], "maps": [4, 1, 2, 2]}[shape]


def test_batches_of_any_kind():
    x, _ = data().tensors
    kinds = [DataLoader(x, B), DataLoader(TensorDataset(x), B), DataLoader(data(), B)]
    nets = []
    G, C = generator(), critic()
    for loader in kinds:
        made = module(copy.deepcopy(G), copy.deepcopy(C), seed=1)
        trainer().fit(made, loader)
        nets.append(made.state_dict())
    assert same(nets[0], nets[1])
    assert same(nets[0], nets[2])
    assert not x.requires_grad


def test_a_generator_without_parameters_is_taken_as_it_is():
    made = module(nn.Linear(3, D).double().requires_grad_(False), critic(), penalty=R1())
    before = copy.deepcopy(made.generator)
    runner = trainer()
    runner.fit(made, DataLoader(data(), B))
    assert len(runner.optimizers) == 1
    assert made.counts["generator"] == 0
    assert runner.global_step == 14
    assert_same(made.generator, before)


def test_a_loss_of_ones_own():
    def squared(real, fake):
        return (real - 1).square().mean() + fake.square().mean()

    loss = GANLoss(squared, lambda real, fake: (fake - 1).square().mean())
    C, record = critic(), Record()
    params = copy.deepcopy(C)
    made = module(generator(), C, loss=loss)
    trainer(max_epochs=1, log_every_n_steps=1, logger=record).fit(made, DataLoader(data(), B))
    true = squared(params(C.seen[0]), params(C.seen[1])).item()
    assert record.rows[0]["train/critic_loss"] == pytest.approx(true)
    assert "wasserstein/raw" not in record.rows[0]


WRONG = [
    ({"generator": lambda z: z}, TypeError, r"`generator=...` must be a torch.nn.Module; got a fu"),
    ({"critic": 3}, TypeError, r"`critic=...` must be a torch.nn.Module; got a int"),
    ({"critic": nn.Tanh()}, ValueError, r"`critic=...` has no parameter that requires grad"),
    ({"latent_dim": 0}, ValueError, r"`latent_dim=...` must be an integer >= 1; got 0"),
    ({"loss": "wassertein"}, ValueError, r"`loss=...` must be.*did you mean 'wasserstein'"),
    ({"loss": F.mse_loss}, TypeError, r"`loss=...` must be a name or a GANLoss; got <function"),
    ({"penalty": "r1"}, TypeError, r"a list or dict of them; got 'r1'"),
    ({"penalty": gpkit.irm()}, TypeError, r"'irm' compares environments.*use PenalizedModule"),
    (
        {"penalty": gpkit.r1(), "generator_penalty": {"r1": gpkit.jacobian()}},
        ValueError,
        r"both have a penalty 'r1'.*generator_penalty=\{'generator_r1': \.\.\.\}",
    ),
    (
        {"generator": nn.Tanh(), "generator_penalty": gpkit.path_length()},
        ValueError,
        r"`generator_penalty=...` needs a generator to train",
    ),
    ({"critic_steps": 0}, ValueError, r"`critic_steps=...` must be an integer >= 1; got 0"),
    ({"accumulate": 1.5}, ValueError, r"`accumulate=...` must be an integer >= 1; got 1.5"),
    ({"ema": 1.0}, ValueError, r"`ema=...` must be a number in \[0, 1\); got 1.0"),
    ({"ema": -0.1}, ValueError, r"`ema=...` must be a number >= 0; got -0.1"),
    ({"clip": 0}, ValueError, r"`clip=...` must be a number > 0; got 0"),
    ({"gradient_clip": 0}, ValueError, r"`gradient_clip=...` must be a number > 0; got 0"),
    ({"seed": -1}, ValueError, r"`seed=...` must be an integer >= 0; got -1"),
    ({"simultaneous": True, "penalty_steps": True}, ValueError, r"leave one of them out"),
    ({"histogram_every_n_epochs": -1}, ValueError, r"must be an integer >= 0; got -1"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), WRONG)
def test_wrong_arguments(arguments, error, words):
    given = {"generator": generator(), "critic": critic(), "latent_dim": 3, **arguments}
    with pytest.raises(error, match=words):
        GANModule(**given)


def test_nets_that_share_parameters():
    G = generator()
    with pytest.raises(ValueError, match="share 6 parameters"):
        GANModule(G, nn.Sequential(G, nn.Linear(D, 1)), latent_dim=3)


@pytest.mark.parametrize(
    ("options", "batch", "error", "words"),
    [
        ({}, torch.ones(4, 3).double(), ValueError, r"shape of the data, \[4, 3\]; got \[4, 2\]"),
        ({}, torch.ones(4).long(), TypeError, r"floating-point samples x.*got \(torch.int64 \[4\]"),
        (
            {},
            {"x": torch.ones(4, 2).long()},
            TypeError,
            r"takes batches x, \(x,\) or \(x, y\).*or a dict of them; got \(dict",
        ),
        ({"conditional": True}, torch.ones(4, 2).double(), TypeError, r"takes batches \(x, y\)"),
        ({"critic": "mean"}, torch.ones(4, 2).double(), ValueError, r"each of 4 samples.*got \[\]"),
    ],
)
def test_wrong_batches(options, batch, error, words):
    C = critic()
    if options.pop("critic", ""):
        C.register_forward_hook(lambda net, x, y: y.mean())
    made = module(generator(), C, **options)
    with pytest.raises(error, match=words):
        trainer(log_every_n_steps=1).fit(made, DataLoader([batch], batch_size=None))


def test_a_strategy_that_shards_nets_is_refused():
    sharded = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(RuntimeError, match="got FSDPStrategy: use strategy='ddp'"):
        require_support(sharded, simultaneous=False)
