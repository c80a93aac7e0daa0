"""GANs from a config: the nets and what they are given, what is logged and written, going on."""

import json
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD, Adam

import gpkit
from gpkit.app.build import build_callbacks, build_module, make_net, recipes
from gpkit.app.overrides import CONFIG_DIR
from gpkit.data import Digits, EightGaussians
from gpkit.models import PointCritic, PointGenerator

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"]
PAIR = ["module=gan", "model=gan_points", "data=eight_gaussians", "penalty=wgan_gp"]
SMALL = [
    *QUIET,
    *PAIR,
    "model.generator.width=16",
    "model.critic.width=16",
    "data.train_size=1280",
    "data.val_size=256",
    "data.test_size=300",
    "module.critic_steps=2",
]
FIGURES = "+callbacks.figures._target_=gpkit.lightning.gan.figures.GANFigures"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(*options):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", [*QUIET, *PAIR, *options])


def checkpoint(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


# A run.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the metrics of a run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return gpkit.train([*SMALL, "trainer.max_epochs=2", FIGURES], folder), folder


WHERE = ("real", "fake", "interpolates")
LOSSES = {"critic_loss", "generator_loss"}
WASSERSTEIN = {"wasserstein/raw", "wasserstein/debiased"}
PROMISED = {
    "critic_optimality",
    "modes/covered",
    "modes/high_quality",
    "penalty/wgan_gp",
    "penalty/wgan_gp/weight",
    "penalty/wgan_gp/norm",
    *WASSERSTEIN,
    *(f"train/{name}" for name in LOSSES),
    *(f"{stage}/{name}" for stage in ("val", "test") for name in LOSSES | WASSERSTEIN),
    *(f"slope/{where}{what}" for where in WHERE for what in ("", "/max", "/above_center")),
}


def test_metrics_are_returned_and_written(run):
    metrics, folder = run
    assert metrics.keys() == PROMISED
    assert all(math.isfinite(value) for value in metrics.values())
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["penalty/wgan_gp/weight"] == 10
    raw, debiased, slope = (
        metrics[name] for name in ("wasserstein/raw", "wasserstein/debiased", "slope/interpolates")
    )
    assert debiased == pytest.approx(raw / slope, rel=1e-5)


def test_figures_are_written(run):
    for name in ("samples", "surface"):
        with Image.open(run[1] / f"figures/{name}.png") as figure:
            assert figure.size[0] > 400
    images = EventAccumulator(str(run[1]), {"images": 0}).Reload().Tags()["images"]
    assert set(images) == {"samples", "surface"}


def test_the_steps_of_a_run_are_exact(run):
    assert checkpoint(run[1])["gpkit_gan"] == {
        "critic": 10,  # 2 epochs of 5 batches
        "generator": 5,  # every second
        "draws": 10,
        "seed": 0,
    }


def test_the_last_weights_are_tested(run):
    """A GAN has no val/loss: the file is there, and not the one of the best epoch."""
    metrics, folder = run
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    state = checkpoint(folder)["state_dict"]
    critic = PointCritic((2,), width=16)
    critic.load_state_dict(
        {k.removeprefix("critic."): v for k, v in state.items() if k.startswith("critic.")}
    )
    generator = PointGenerator(16, (2,), width=16)
    generator.load_state_dict(
        {k.removeprefix("generator."): v for k, v in state.items() if k.startswith("generator.")}
    )
    data = EightGaussians(train_size=1280, val_size=256, test_size=300)
    data.setup("fit")
    x = data.test_set.tensors[0]
    z = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = critic(x[:256]).mean(), critic(x[256:]).mean()
        of_fake = critic(generator(z))
        raw = (256 * first + 44 * second) / 300 - of_fake.mean()
    # 300 latents of its own against our 100000
    error = of_fake.std().item() / math.sqrt(300)
    assert metrics["test/wasserstein/raw"] == pytest.approx(raw.item(), abs=4 * error)
    assert 4 * error < 0.3 * abs(raw.item())


def test_the_end_says_what_came_of_it(run, capsys):
    from gpkit.app.report import say_results

    metrics, folder = run
    say_results(folder, metrics, "last", [])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    shown = {
        *(f"test/{name}" for name in LOSSES | WASSERSTEIN),
        *WASSERSTEIN,
        *("critic_optimality", "modes/covered", "modes/high_quality", "slope/interpolates"),
    }
    assert told.keys() - shown == {*("tested", "metrics", "checkpoints", "figures", "TensorBoard")}
    for name in shown:
        assert told[name] == f"{metrics[name]:.4f}"
    assert told["figures"] == str(folder / "figures")


@pytest.mark.parametrize(
    "options",
    [
        ["penalty=wgan_gp", "module.ema=0.9"],
        [
            "penalty=sum",
            "penalty.parts={wgan_gp:{every:2},r1:{weight:1}}",
            "module.loss=non_saturating",
            "module.accumulate=2",
            "module.critic_scheduler="
            "{_target_:torch.optim.lr_scheduler.ExponentialLR,_partial_:true,gamma:0.9}",
            "module.generator_penalty={_target_:gpkit.path_length,every:2}",
        ],
    ],
    ids=["average", "sum, scheduler, path length"],
)
def test_a_resumed_run_is_the_run(options, tmp_path):
    """Nets, both optimisers, penalties, counts, and what is logged, bit for bit."""
    options = [*SMALL, "data.train_size=1152", *options]  # 4.5 batches: the window is in between
    whole = gpkit.train([*options, "trainer.max_epochs=5"], tmp_path / "whole")
    gpkit.train([*options, "trainer.max_epochs=3"], tmp_path / "part")
    go_on = f"ckpt_path={tmp_path / 'part/checkpoints/last.ckpt'}"
    resumed = gpkit.train([*options, "trainer.max_epochs=5", go_on], tmp_path / "resumed")
    assert resumed == whole
    first, second = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "resumed")
    assert first["gpkit_gan"]["generator"] > 5
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "gpkit_gan"):
        same(first[key], second[key])
    for key in ("gpkit_penalties", "gpkit_generator_penalties"):
        same(first[key], second[key])
    assert len(first["optimizer_states"]) == 2


def same(a, b):
    """Check that two states are equal, tensors bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


# What is built.


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


# Experiments.


@pytest.mark.parametrize(
    ("experiment", "critic_steps", "generator_steps"),
    [
        ("wgan_gp_25gaussians", 15_000, 3_000),
        ("gan_25gaussians", 15_000, 3_000),
        ("wgan_gp_8gaussians", 5_000, 1_000),
        ("wgan_gp_swiss_roll", 5_000, 1_000),
    ],
)
def test_the_length_of_an_experiment(experiment, critic_steps, generator_steps):
    cfg = config_of(experiment)
    n, batch = int(cfg.data.n * (1 - cfg.data.test_size)), cfg.data.batch_size
    batches = min(cfg.trainer.limit_train_batches, -(-n // batch))
    assert cfg.data.val_size == 0
    assert cfg.trainer.max_epochs * batches == critic_steps
    assert critic_steps // cfg.module.critic_steps == generator_steps


def config_of(experiment):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", [f"experiment={experiment}"])


def test_the_control_differs_in_loss_and_penalty_alone():
    one, other = (config_of(name) for name in ("wgan_gp_25gaussians", "gan_25gaussians"))
    assert (one.module.loss, other.module.loss) == ("wasserstein", "non_saturating")
    assert (one.penalty.weight, other.penalty._target_) == (0.1, "gpkit.none")
    for cfg in (one, other):
        del cfg.penalty, cfg.module.loss
    assert one == other
