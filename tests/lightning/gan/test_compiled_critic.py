"""GANModule(compile=True): steps of both nets as graphs train as the eager ones."""

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit


def fitted(*, compile):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    critic = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    penalties = [gpkit.wgan_gp(seed=1), gpkit.r1(every=2, seed=2)]  # the latter reuses the scores
    module = gpkit.GANModule(
        generator,
        critic,
        latent_dim=2,
        penalty=penalties,
        generator_penalty=gpkit.jacobian(weight=0.5, seed=4),
        critic_steps=1,
        seed=3,
        compile=compile,
    )
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, **QUIET)
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 96).reshape(32, 3)), batch_size=8)
    trainer.fit(module, data)
    return module, trainer.callback_metrics


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
def test_trains_and_logs_as_the_eager_one():
    (eager, expected), (module, found) = (fitted(compile=c) for c in (False, True))
    assert all(own.obstacle is None for own in module.compiled.values())
    assert [own is None for own in module.compiled["critic"].terms] == [False, True]  # at the end
    assert module.compiled["generator"].terms[0].weight == 0.5
    torch.testing.assert_close(dict(module.state_dict()), dict(eager.state_dict()))
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-5, atol=1e-6)
    for own in ("penalties", "generator_penalties"):
        assert getattr(module, own).state_dict() == getattr(eager, own).state_dict()


def test_a_penalty_that_takes_differences_is_not_compiled():
    with pytest.warns(UserWarning, match=r"`compile=True` has no effect: 'r1' takes differences"):
        module = gpkit.GANModule(
            nn.Linear(2, 3),
            nn.Linear(3, 1),
            latent_dim=2,
            penalty=gpkit.r1(estimator="finite_difference"),
            compile=True,
        )
    assert module.compiled["critic"] is None
