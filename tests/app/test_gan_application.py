"""GANs from a config: a run, what is logged and written, going on, and the experiments."""

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpkit
from gpkit.app.overrides import CONFIG_DIR
from gpkit.data import EightGaussians
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
    from gpkit.app.shown.lines import say_results

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
