"""The groups logger, scheduler, callbacks and debug, the tasks, and what is read of the options."""

import csv
import math
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpkit
from gpkit.app.overrides import CONFIG_DIR
from gpkit.app.train import count_steps

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false", "penalty=none"]
SMALL = [*QUIET, "data.train_size=256", "model.width=16", "trainer.log_every_n_steps=1"]
STEPS = 12  # three epochs of four batches


def rates(schedule, folder, *options):
    """Return the learning rate of each step of a run."""
    seen = [f"+callbacks.seen._target_={__name__}.Rates"]
    Rates.found.clear()
    options = [f"scheduler={schedule}", "trainer.max_epochs=3", "optimizer.lr=0.01", *options]
    gpkit.train([*SMALL, *seen, *options], folder)
    return list(Rates.found)


class Rates(Callback):
    """Notes the learning rate of each step."""

    found: ClassVar[list] = []

    def on_train_batch_start(self, trainer, *_):
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])


CURVES = {
    "none": lambda t: 0.01,
    "cosine": lambda t: 0.005 * (1 + math.cos(math.pi * t / STEPS)),
    "step": lambda t: 0.01 * 0.1 ** ((t >= 4) + (t >= 8)),
    "warm_up": lambda t: 0.01 if t else 0.0001,
}


@pytest.mark.parametrize("schedule", CURVES)
def test_a_schedule_runs_over_all_optimiser_steps(schedule, tmp_path):
    found = rates(schedule, tmp_path)
    assert found == pytest.approx([CURVES[schedule](t) for t in range(STEPS)], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], 12),
        (["+trainer.max_steps=5"], 5),
        (["trainer.accumulate_grad_batches=3"], 6),
        (["+trainer.limit_train_batches=3"], 9),
        (["device.devices=2"], 6),  # each process has half of the batches
        (["device.devices=2", "+trainer.limit_train_batches=1"], 3),
    ],
)
def test_the_steps_of_a_run_are_counted(options, steps):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", [*SMALL, "trainer.max_epochs=3", *options])
    assert count_steps(cfg, 4) == steps


def test_one_cycle_rises_and_falls_to_zero(tmp_path):
    found = rates("one_cycle", tmp_path)
    top = found.index(max(found))
    assert max(found) == pytest.approx(0.01, rel=0.05)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert found[-1] < 1e-4


def test_plateau_watches_the_validation_loss(tmp_path):
    options = ["scheduler.patience=0", "scheduler.threshold_mode=abs", "scheduler.threshold=100"]
    found = rates("plateau", tmp_path, *(f"+{o}" if "thresh" in o else o for o in options))
    assert found == pytest.approx([0.01] * 8 + [0.001] * 4)


def test_a_schedule_of_a_pair_counts_the_steps_of_each_net(tmp_path):
    options = ["module=gan", "model=gan_points", "data=eight_gaussians", "scheduler=cosine"]
    options += ["trainer.max_epochs=2", "+trainer.limit_train_batches=10", "module.critic_steps=5"]
    gpkit.train(
        ["device=cpu", "trainer.enable_progress_bar=false", "penalty=wgan_gp", *options], tmp_path
    )
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert [s["T_max"] for s in saved["lr_schedulers"]] == [20, 4]
    assert [s["last_epoch"] for s in saved["lr_schedulers"]] == [20, 4]


def test_several_loggers_and_none(tmp_path):
    options = [*SMALL, "trainer.max_epochs=1"]
    gpkit.train([*options, "logger=[tensorboard,csv]"], tmp_path / "both")
    rows = list(csv.DictReader((tmp_path / "both/csv/metrics.csv").read_text().splitlines()))
    assert any(row["train/loss"] for row in rows)
    assert EventAccumulator(str(tmp_path / "both")).Reload().Scalars("train/loss")
    gpkit.train([*options, "logger=none"], tmp_path / "none")
    assert {p.name for p in (tmp_path / "none").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.json",
        "result.json",
    }


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_missing_says_what_to_install(name, tmp_path):
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=f"logger={name} needs a package.*pip install"):
        gpkit.train([*SMALL, f"logger={name}"], tmp_path)


def test_early_stopping_ends_a_run(tmp_path):
    options = ["callbacks=[early_stopping]", "callbacks.early_stopping.patience=1"]
    options += ["optimizer.lr=0.0", "trainer.max_epochs=50"]
    gpkit.train([*SMALL, *options], tmp_path)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_the_norms_of_the_monitor_replace_those_of_the_module(tmp_path):
    metrics = gpkit.train([*SMALL, "callbacks=[norms]", "trainer.max_epochs=1"], tmp_path)
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert "grad_norm/weight" in tags
    assert "val/grad_norm/weight" not in metrics  # of the module alone


@pytest.mark.parametrize("name", ["overfit", "profiler", "anomaly"])
def test_debugging(name, tmp_path):
    epochs = 60 if name == "overfit" else 1
    metrics = gpkit.train([*SMALL, f"debug={name}", f"trainer.max_epochs={epochs}"], tmp_path)
    if name == "overfit":
        assert metrics["train/loss"] < 1.0  # from 2.3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return gpkit.train([*SMALL, "trainer.max_epochs=2"], folder), folder


def test_a_checkpoint_is_tested_without_training(trained, tmp_path):
    metrics, folder = trained
    path = folder / "checkpoints/best.ckpt"
    tested = gpkit.train([*SMALL, "task=test", f"ckpt_path={path}"], tmp_path)
    assert tested == {k: v for k, v in metrics.items() if k.startswith("test/")}
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_predicts(trained, tmp_path, capsys):
    path = trained[1] / "checkpoints/best.ckpt"
    gpkit.train([*SMALL, "task=predict", f"ckpt_path={path}"], tmp_path)
    assert f"run      predict of {path}, no training, seed 0\n" in capsys.readouterr().out
    found = torch.load(tmp_path / "predictions.pt")
    data = gpkit.data.Digits(train_size=256)
    data.setup("fit")
    x = torch.cat([x for x, _ in data.test_dataloader()])
    torch.testing.assert_close(found, gpkit.load(path)(x).detach())


@pytest.mark.parametrize(
    ("task", "words"), [("test", "test_dataloader"), ("predict", "or predict_dataloader")]
)
def test_a_task_without_its_data_is_refused(task, words, trained, tmp_path):
    options = [
        f"task={task}",
        "data.test_size=0",
        f"ckpt_path={trained[1] / 'checkpoints/last.ckpt'}",
    ]
    with pytest.raises(ValueError, match=rf"task={task}: Digits has no test set: .*{words}\(\)"):
        gpkit.train([*SMALL, *options], tmp_path)


def test_a_net_is_loaded_and_nothing_in_the_checkpoint_is_executed(trained, tmp_path):
    path = trained[1] / "checkpoints/best.ckpt"
    net = gpkit.load(path)
    assert isinstance(net, gpkit.models.MLP)
    assert not net.training
    saved = torch.load(path, weights_only=True)
    assert saved["gpkit_config"]["model"]["width"] == 16
    saved["gpkit_nets"]["net"]["_target_"] = "os.system"
    torch.save(saved, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"a net of os\.system, which is not executed: give a net"):
        gpkit.load(tmp_path / "bad.ckpt")
    own = gpkit.models.MLP((1, 8, 8), 10, width=16)
    given = gpkit.load(tmp_path / "bad.ckpt", own)
    assert given is own
    torch.testing.assert_close(given.state_dict(), net.state_dict())
    with pytest.raises(ValueError, match="does not fit the net: size mismatch"):
        gpkit.load(path, gpkit.models.MLP((1, 8, 8), 10, width=8))
    with pytest.raises(ValueError, match=r"part=.* must be one of 'net'; got 'critic'"):
        gpkit.load(path, part="critic")
    with pytest.raises(ValueError, match="no such file; beside it there are best"):
        gpkit.load(path.with_name("none.ckpt"))


def test_a_generator_is_loaded(tmp_path):
    options = ["module=gan", "model=gan_points", "data=swiss_roll", "module.ema=0.9"]
    options += ["device=cpu", "trainer=fast_dev_run", "trainer.enable_progress_bar=false"]
    gpkit.train([*options, "penalty=wgan_gp"], tmp_path)
    path = tmp_path / "checkpoints/last.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    for part, own in ((None, "ema_generator"), ("critic", "critic"), ("generator", "generator")):
        net = gpkit.load(path, part=part)
        weights = {
            k.removeprefix(f"{own}."): v for k, v in saved.items() if k.startswith(f"{own}.")
        }
        torch.testing.assert_close(net.state_dict(), weights)


REFUSED = {
    "+foo=3": r"nothing reads 'foo'; there are callbacks,",
    "+lr_scheduler=cosine": r"nothing reads 'lr_scheduler' \(did you mean 'scheduler'",
    "+scheduler=cosine": r"one scheduler is chosen already: scheduler=cosine, without \+",
    "+scheduler.foo=1": r"nothing reads scheduler\.foo, since scheduler\._target_ is null",
    "+loss.foo=1": r"nothing reads loss\.foo, since loss\._target_ is null",
    "+debug.foo=1": r"nothing reads debug\.foo: use debug=anomaly, ",
    "+logger.foo=1": r"logger\.foo must be null or have a _target_; got 1",
    "+trainer.logger=x": r"the run sets trainer\.logger: use logger=csv",
    "+trainer.devices=2": r"the run sets trainer\.devices: use device\.devices=2",
    "trainer.gradient_clip_val=-1": r"`trainer\.gradient_clip_val` must be a number >= 0; got -1",
    "optimized_metric=test/accc": r"test/accc is not logged \(did you mean 'test/acc'",
    "optimized_metric=val/accc": r"val/accc is not logged \(did you mean 'val/acc'",
    "device.devices=1000": r"device\.devices=1000 on the CPU .* cores: use at most",
    "task=tset": r"`task` must be one of .*did you mean 'test'",
    "task=test": r"task=test needs a checkpoint: ckpt_path=RUN",
    "scheduler=cosin": r"no scheduler 'cosin' \(did you mean 'cosine'",
    "logger=[tensorbord]": r"no logger 'tensorbord' \(did you mean 'tensorboard'",
    "model=mpl": r"no model 'mpl' \(did you mean 'mlp'",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_nothing_reads_or_cannot_be_is_refused(option, tmp_path):
    with pytest.raises((ValueError, TypeError), match=REFUSED[option]) as error:
        gpkit.train([*SMALL, "trainer.max_epochs=1", option], tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.json").exists()


def test_a_metric_of_validation_is_looked_for_when_there_was_one(tmp_path):
    gpkit.train([*SMALL, "trainer.max_epochs=1", "+trainer.check_val_every_n_epoch=2"], tmp_path)
    options = ["trainer.max_epochs=1", "+trainer.limit_val_batches=0"]
    assert "val/loss" not in gpkit.train([*SMALL, *options], tmp_path)


def test_a_value_that_others_are_made_of_is_read(tmp_path):
    gpkit.train([*SMALL[:-2], "trainer=fast_dev_run", "+n=3", "model.width=${n}"], tmp_path)
    assert gpkit.load(tmp_path / "checkpoints/last.ckpt").features[0].out_features == 3


def test_a_plateau_is_not_for_a_pair(tmp_path):
    options = ["experiment=wgan_gp_8gaussians", "scheduler=plateau", *QUIET[:2]]
    with pytest.raises(ValueError, match="scheduler=plateau needs val/loss, which"):
        gpkit.train(options, tmp_path)


def test_options_must_be_a_list():
    with pytest.raises(TypeError, match=r"takes a list of strings, as .*got 'model=mlp'"):
        gpkit.train("model=mlp")
