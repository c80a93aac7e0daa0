"""What a run shows: its first and last lines, the bar, and TensorBoard."""

import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import gpkit
from gpkit.app.callbacks.bar import Bar

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false"]
SMALL = ["data.train_size=256", "model.width=16", "trainer.log_every_n_steps=1"]
OPTIONS = [
    *QUIET,
    *SMALL,
    "trainer.max_epochs=2",
    "penalty=jacobian",
    "penalty.weight=0.3",
    "seed=5",
]
PAIR = [*QUIET, "trainer.log_every_n_steps=1", "trainer.max_epochs=3", "data.train_size=512"]
PAIR += ["module=gan", "model=gan_points", "data=eight_gaussians", "penalty=wgan_gp"]
PAIR += ["module.critic_steps=2", "+callbacks.f._target_=gpkit.lightning.gan.figures.GANFigures"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the metrics of a run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return gpkit.train(OPTIONS, folder), folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the events of a run of a generator and a critic."""
    folder = tmp_path_factory.mktemp("pair")
    gpkit.train(PAIR, folder)
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()


@pytest.fixture(scope="module")
def events(run):
    return EventAccumulator(str(run[1])).Reload()


def test_the_first_lines_say_what_runs_and_the_last_what_was_tested(tmp_path, capsys):
    gpkit.train(OPTIONS, tmp_path)
    out = capsys.readouterr().out
    for words in (
        "model    MLP with 1,482 parameters",
        "data     Digits, 256 train, 269 val, 269 test",
        "penalty  jacobian, weight 0.3",
        "device   CPU, 1 process, 32-true",
        "run      2 epochs, 8 steps, seed 5",
        "penalty=jacobian penalty.weight=0.3 seed=5",
        f"tested       {tmp_path / 'checkpoints/best.ckpt'}",
    ):
        assert words in out


def test_the_bar_shows_the_loss_the_penalty_the_norm_and_the_accuracy(tmp_path, monkeypatch):
    seen = []
    original = Bar.get_metrics

    def note(self, trainer, module):
        shown = original(self, trainer, module)
        seen.append((shown, dict(trainer.callback_metrics)))
        return shown

    monkeypatch.setattr(Bar, "get_metrics", note)
    options = [o for o in OPTIONS if "progress_bar" not in o]
    gpkit.train([*options, "trainer.enable_progress_bar=true"], tmp_path)
    shown, metrics = next(pair for pair in reversed(seen) if "train/loss" in pair[1])
    names = {
        "train/loss": "loss",
        "penalty/jacobian": "penalty",
        "grad_norm/weight": "grad norm",
        "val/acc": "val/acc",
    }
    assert shown == {new: float(metrics[old]) for old, new in names.items()}
    assert [*shown] == ["loss", "penalty", "grad norm", "val/acc"]


def test_several_penalties_are_one_number_on_the_bar():
    class Trainer:
        callback_metrics = {  # noqa: RUF012
            "penalty/a": torch.tensor(1.0),
            "penalty/b": torch.tensor(2.0),
            "penalty/b/weight": torch.tensor(5.0),
            "train/critic_loss": torch.tensor(3.0),
            "modes/covered": torch.tensor(8.0),
        }

    assert Bar().get_metrics(Trainer, None) == {"loss": 3.0, "penalty": 3.0, "modes": 8.0}


def test_tensorboard_has_the_config_as_text(events):
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "_target_: gpkit.models.MLP" in text


def matched(patterns, events):
    """Return the curves that TensorBoard draws for these patterns: it calls re.match."""
    tags = events.Tags()["scalars"]
    found = [[tag for tag in tags if re.match(pattern, tag)] for pattern in patterns]
    assert all(found)
    return [tag for each in found for tag in each]


def layout_of(events):
    """Return the curves of each plot, by the title of the plot."""
    stored = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    return {
        (category.title.split(",")[0], chart.title): matched(chart.multiline.tag, events)
        for category in Layout.FromString(stored).category
        for chart in category.chart
    }


def test_training_and_validation_share_a_plot(events, pair):
    found = layout_of(events)
    assert found["gradient norms", "in the weights"] == ["grad_norm/weight", "val/grad_norm/weight"]
    assert found["gradient norms", "in the inputs"] == ["grad_norm/input", "val/grad_norm/input"]
    assert found["loss", "loss"] == ["train/loss", "val/loss"]  # not the total
    assert all(1 < len(tags) < 4 for tags in layout_of(pair).values())


def test_the_penalty_its_weight_and_the_seed_are_the_first_columns(events):
    contents = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(contents["_hparams_/session_start_info"])
    found = start.session_start_info.hparams
    assert found["penalty"].string_value == "jacobian"
    assert found["penalty/weight"].number_value == 0.3
    assert found["penalty/_target_"].string_value == "gpkit.jacobian"
    assert found["seed"].number_value == 5
    assert found["model/width"].number_value == 16
    assert not any(key.startswith("hydra") for key in found)
    columns = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment.hparam_infos
    shown = sorted(columns, key=lambda c: (not c.differs, c.name))  # as TensorBoard sorts them
    assert [c.name for c in shown][:3] == ["penalty", "penalty/weight", "seed"]


def test_a_second_run_in_a_folder_replaces_the_curves_of_the_first(tmp_path):
    gpkit.train([*OPTIONS, "optimizer.lr=0.1"], tmp_path)
    first = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    gpkit.train(OPTIONS, tmp_path)
    second = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [p.step for p in second] == [p.step for p in first] == list(range(8))
    assert second[-1].value != first[-1].value


def test_scalars_and_images_of_a_pair_share_one_step_count(pair):
    """Not Lightning's, which counts the steps of both optimisers."""
    batches = 3 * 2
    assert pair.Scalars("train/critic_loss")[-1].step == batches - 1
    assert pair.Scalars("val/critic_loss")[-1].step == batches - 1
    assert pair.Images("samples")[-1].step == batches
    assert pair.Images("surface")[-1].step == batches


def test_a_run_of_a_sweep_is_named_by_what_was_varied(command):
    fast = [*QUIET, "trainer=fast_dev_run", "model.width=4", "penalty=none", "seed=0,1"]
    command("-m", *fast, "hydra.sweep.dir=sweep")
    assert {p.parent.name for p in Path("sweep").glob("*/result.json")} == {"0-seed=0", "1-seed=1"}
