"""GANs from a config: which nets, optimisers and callbacks are made, and what they are given."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.optim import SGD, Adam

import gpkit
from gpkit.app.build import build_callbacks, build_module, make_net, recipes
from gpkit.app.overrides import CONFIG_DIR
from gpkit.data import Digits, EightGaussians

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"]
PAIR = ["module=gan", "model=gan_points", "data=eight_gaussians", "penalty=wgan_gp"]


def config(*options):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", [*QUIET, *PAIR, *options])


def data_of(cls, **options):
    data = cls(**options)
    data.setup("fit")
    return data


def test_both_nets_have_the_optimizer_of_the_config_or_one_of_their_own():
    own = "module.critic_optimizer={_target_:torch.optim.SGD,_partial_:true,lr:0.5}"
    module = build_module(config("optimizer.lr=0.25", own), data_of(EightGaussians), set())
    critic, generator = (each["optimizer"] for each in module.configure_optimizers())
    assert (type(critic), critic.defaults["lr"]) == (SGD, 0.5)
    assert (type(generator), generator.defaults["lr"]) == (Adam, 0.25)
    assert {id(p) for p in generator.param_groups[0]["params"]} == {
        id(p) for p in module.generator.parameters()
    }


def test_schedulers_are_of_their_own_net():
    schedule = "{_target_:torch.optim.lr_scheduler.ConstantLR,_partial_:true,factor:0.5}"
    module = build_module(
        config(f"module.generator_scheduler={schedule}"), data_of(EightGaussians), set()
    )
    critic, generator = module.configure_optimizers()
    assert "lr_scheduler" not in critic
    assert generator["optimizer"].param_groups[0]["lr"] == 0.5 * 0.003


def pair_of(cfg, data, chosen):
    return {name: make_net(name, made) for name, made in recipes(cfg, data, chosen).items()}


@pytest.mark.parametrize("model", ["gan_points", "gan_images"])
def test_a_pair_makes_what_the_data_are(model):
    data = data_of(Digits)
    nets = pair_of(config(f"model={model}", "module.latent_dim=7"), data, set())
    fake = nets["generator"](torch.zeros(5, 7))
    assert fake.shape == (5, 1, 8, 8)
    assert nets["critic"](fake).shape == (5, 1)


def test_a_conditional_pair_has_the_labels_of_the_data():
    nets = pair_of(config("module.conditional=true"), data_of(EightGaussians), set())
    y = torch.arange(8)
    fake = nets["generator"](torch.zeros(8, 16), y)
    assert len(fake.unique(dim=0)) == 8
    assert nets["critic"](fake, y).shape == (8, 1)
    for net in nets.values():
        assert net.labels.num_classes == 8


def test_a_net_for_any_data_serves_as_generator_and_as_critic():
    mlp = ["model.generator._target_=gpkit.models.MLP", "model.critic._target_=gpkit.models.MLP"]
    options = [*mlp, "model.critic.depth=1", "module.latent_dim=3"]
    nets = pair_of(config(*options), data_of(EightGaussians), {"model.critic.depth"})
    assert nets["generator"](torch.zeros(5, 3)).shape == (5, 2)
    assert nets["critic"](torch.zeros(5, 2)).shape == (5, 1)
    assert sum(isinstance(part, nn.Linear) for part in nets["critic"].modules()) == 2


OWN = """
from torch import nn

class Lean(nn.Linear):  # takes no width, no depth
    def __init__(self, latent_dim):
        super().__init__(latent_dim, 2)

class Narrow(Lean):
    def __init__(self, latent_dim, width=1):
        super().__init__(latent_dim)
"""


def test_options_that_were_set_reach_the_net_that_they_are_for(tmp_path, monkeypatch):
    Path(tmp_path, "own_pair.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["model.generator._target_=own_pair.Lean", "model.critic.width=8"]
    data = data_of(EightGaussians)
    module = build_module(config(*options), data, {"model.critic.width"})
    assert module.generator.weight.shape == (2, 16)
    with pytest.raises(Exception, match="unexpected keyword argument 'width'"):
        build_module(config(*options), data, {"model.generator.width"})


class Module(gpkit.GANModule):
    """One of a user's own, with an option of its own."""

    def __init__(self, generator, critic, *, tilt=0, **options):
        super().__init__(generator, critic, **options)
        self.tilt = tilt


def test_a_module_of_your_own():
    options = [f"module._target_={__name__}.Module", "+module.tilt=3"]
    module = build_module(config(*options), data_of(EightGaussians), set())
    assert (type(module), module.tilt) == (Module, 3)


# Callbacks.


def test_callbacks_are_made_in_order_and_null_is_none():
    cfg = config(
        "+callbacks.a._target_=gpkit.lightning.gan.figures.GANFigures",
        "+callbacks.a.points=7",
        "+callbacks.b=null",
        "+callbacks.c={_target_:pytorch_lightning.callbacks.LearningRateMonitor}",
    )
    first, second = build_callbacks(cfg)
    assert first.points == 7
    assert type(second).__name__ == "LearningRateMonitor"
    assert build_callbacks(config()) == []
