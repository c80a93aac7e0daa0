"""GANModule in half precision and under a gradient scaler."""

import copy
from functools import partial

import pytest
import torch
from gans import R1, B, assert_same, critic, data, generator, module, trainer
from modules import ScaledOnly
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

import gpkit
from gpkit.lightning.gan.losses import GANLoss


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": {"gp": gpkit.wgan_gp(5.0, seed=1), "r1": R1()}},
        {"penalty": R1(every=2), "penalty_steps": True},
        {"penalty": gpkit.weight_grad_norm(0.1), "gradient_clip": 0.3},
    ],
    ids=["both", "penalty steps", "gradient clip"],
)
def test_a_scaler_changes_nothing(options):
    G, C = generator(), critic()
    made = [module(copy.deepcopy(G), copy.deepcopy(C), seed=3, **copy.deepcopy(options))]
    made.append(module(G, C, seed=3, **options))
    trainer().fit(made[0], DataLoader(data(), B))
    plugin = ScaledOnly(1024.0)
    trainer(plugins=[plugin]).fit(made[1], DataLoader(data(), B))
    assert plugin.scaler.get_scale() > 4096  # it has grown between the steps
    assert_same(made[1].critic, made[0].critic)
    assert_same(made[1].generator, made[0].generator)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains_as_float32_does(precision):
    G, C = generator().float(), critic().float()
    loader = DataLoader(TensorDataset(data().tensors[0].float()), B)
    plain, half = (
        module(copy.deepcopy(G), copy.deepcopy(C), penalty=gpkit.wgan_gp(1.0, seed=1), seed=3)
        for _ in range(2)
    )
    trainer(max_epochs=1).fit(plain, loader)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plugin = MixedPrecision(precision, "cpu", scaler if precision == "16-mixed" else None)
    trainer(max_epochs=1, plugins=[plugin]).fit(half, loader)
    for name, start, still in [  # and a bias without a gradient: it cancels, or has a norm after it
        ("critic", C, "layers.2.bias"),
        ("generator", G, "layers.0.bias"),
    ]:
        ends = [dict(getattr(made, name).named_parameters()) for made in (plain, half)]
        for key, before in start.named_parameters():
            true, found = (end[key] - before for end in ends)
            assert (true.norm() > 1e-3) == (key != still), key
            assert key == still or (found - true).norm() < 0.1 * true.norm(), key


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_scale_does_not_reach_the_inner_gradient_so_it_is_taken_in_float32(precision):
    C, half = critic().float(), []
    C.register_forward_hook(lambda net, x, y: half.append(y.dtype != torch.float32))
    loader = DataLoader(data().tensors[0].float(), B)
    penalty = {"gp": gpkit.wgan_gp(), "r1": R1(), "weight": gpkit.weight_grad_norm()}
    made = module(generator().float(), C, penalty=penalty)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if precision == "16-mixed" else None
    plugin = MixedPrecision(precision, "cpu", scaler)
    trainer(plugins=[plugin], limit_train_batches=1, max_epochs=1).fit(made, loader)
    if precision == "16-mixed":  # real, fake, and then every penalty makes its own
        assert half == [True, True, False, False, False, False]
    else:  # R1 and the weights take the graph that is there
        assert half == [True, True, True]


def test_losses_of_half_precision_scores_are_taken_in_float32():
    seen = []

    def watched(real, fake):
        seen.extend(scores.dtype for scores in (real, fake))
        return fake.mean() - real.mean()

    loss = GANLoss(watched, lambda real, fake: watched(real, fake), paired=True)
    made = module(generator().float(), critic().float(), loss=loss, critic_steps=1)
    loader = DataLoader(data().tensors[0].float(), B)
    trainer(precision="bf16-mixed", limit_train_batches=1, max_epochs=1).fit(made, loader)
    assert torch.float32 in seen
    assert torch.bfloat16 not in seen


def test_steps_that_a_scaler_skips_move_neither_parameters_nor_schedules():
    G, C = generator().float(), critic().float()
    loader = DataLoader(TensorDataset(data().tensors[0].float()), B)
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    made = module(copy.deepcopy(G), copy.deepcopy(C), critic_scheduler=decay, penalty=R1())
    runner = trainer(max_epochs=1, plugins=[ScaledOnly(2.0**127)], limit_train_batches=1)
    runner.fit(made, loader)
    assert_same(made.critic, C)
    assert runner.optimizers[0].param_groups[0]["lr"] == 0.1


def test_a_trainer_under_which_gradients_would_be_wrong():
    made = module(generator(), critic(), simultaneous=True)
    runner = trainer(plugins=[ScaledOnly(2.0)])
    with pytest.raises(RuntimeError, match="`simultaneous=True` needs one gradient scale"):
        runner.fit(made, DataLoader(data(), B))
