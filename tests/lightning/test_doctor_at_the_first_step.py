"""At the first step of a fit an error names the modules; ``doctor=False`` leaves the checks out."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gpkit

BATCH = (torch.randn(6, 4), torch.randn(6, 1))


def hard():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 1))


def kinked():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))


def module(net, penalty, **options):
    return gpkit.PenalizedModule(net, nn.MSELoss(), penalty, **options)


@pytest.mark.parametrize(
    ("net", "penalty", "where"),
    [
        (hard, gpkit.r1, r"hardsigmoid has no second derivative.*\(in the net: '1'\)$"),
        (hard, gpkit.wgan_gp, r"hardsigmoid has no second derivative.*\(in the net: '1'\)$"),
        (kinked, gpkit.curvature, r"piecewise-linear net.*\(in the net: '1', '3'\)$"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Here it is x_:UserWarning")
def test_an_error_names_the_modules(net, penalty, where):
    with pytest.raises(RuntimeError, match=where):
        module(net(), penalty()).penalized_loss(BATCH)


def test_the_first_step_of_a_lazy_penalty():
    """It comes later than the first step of the fit."""
    made = module(hard(), gpkit.r1(gpkit.switch(0.0, 1.0, at=2)))
    made.penalized_loss(BATCH)
    made.penalized_loss(BATCH)
    with pytest.raises(RuntimeError, match=r"\(in the net: '1'\)$"):
        made.penalized_loss(BATCH)


def test_hooks_are_left_at_no_step():
    net = kinked()
    made = module(net, gpkit.r1())
    for _ in range(2):
        made.penalized_loss(BATCH)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Coupled(nn.Module):
    """Its samples depend on each other, which is warned of."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        return self.last((x - x.mean(0)).tanh())


def test_without_a_doctor_nothing_is_checked():
    with pytest.warns(UserWarning, match="the outputs of a batch depend on each other"):
        checked = module(Coupled(), gpkit.r1()).penalized_loss(BATCH)
    torch.manual_seed(0)
    net = Coupled()
    unchecked = module(net, gpkit.r1(), doctor=False)
    loss = unchecked.penalized_loss(BATCH)  # warnings are errors
    x = BATCH[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x)
    value = F.mse_loss(net(x), BATCH[1]) + 5 * g.square().sum(1).mean()
    torch.testing.assert_close(loss, value)
    assert checked.requires_grad
    with pytest.raises(TypeError, match=r"`doctor=...` must be True or False; got 'no'"):
        module(net, gpkit.r1(), doctor="no")


def test_the_callback():
    class Mine(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.backbone = net

        def training_step(self, batch, _):
            return F.mse_loss(self.backbone(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fit(net, penalty, **options):
        callback = gpkit.GradientPenaltyCallback(penalty, module="backbone", **options)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_steps=2,
            callbacks=[callback],
            accelerator="cpu",
            enable_model_summary=False,
            log_every_n_steps=1,
            **quiet,
        )
        trainer.fit(Mine(net), DataLoader(TensorDataset(*BATCH), batch_size=6))
        return trainer

    with pytest.raises(ValueError, match=r"hardsigmoid.*\(in the net: 'backbone.1'\)$"):
        fit(hard(), gpkit.weight_grad_norm())
    with pytest.warns(UserWarning, match="the outputs of a batch depend on each other"):
        fit(Coupled(), gpkit.r1())
    assert fit(Coupled(), gpkit.r1(), doctor=False).global_step == 2


def test_a_pair():
    """The critic's first step names the critic's module."""
    critic = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 1))

    def fit(critic, **options):
        made = gpkit.GANModule(
            nn.Linear(2, 4), critic, latent_dim=2, penalty=gpkit.r1(), critic_steps=1, **options
        )
        trainer = pl.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(made, DataLoader(TensorDataset(BATCH[0]), batch_size=6))

    with pytest.raises(RuntimeError, match=r"hardsigmoid.*\(in the net: '1'\)$"):
        fit(critic)
    with pytest.warns(UserWarning, match="the outputs of a batch depend on each other"):
        fit(Coupled())
    fit(Coupled(), doctor=False)
