"""gpkit.train: from options to a trained net, its metrics and its files."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import gpkit
from gpkit.app.overrides import CONFIG_DIR
from gpkit.app.train import write_metrics
from gpkit.data import Digits
from gpkit.models import MLP

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false"]
SMALL = [*QUIET, "data.train_size=256", "trainer.log_every_n_steps=1", "model.width=32"]
FAST = [*QUIET, "trainer=fast_dev_run"]


def names(group):
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the metrics of a run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    options = ["trainer.max_epochs=6", "penalty.weight=0.1", "optimizer.lr=0.01"]
    return gpkit.train([*SMALL, *options], folder), folder


@pytest.fixture(scope="module")
def events(run):
    return EventAccumulator(str(run[1]), {"histograms": 0, "scalars": 0}).Reload()


NORMS = ["grad_norm/weight", "grad_norm/input"]
EVALUATED = {f"{stage}/{name}" for stage in ("val", "test") for name in ("loss", "acc", *NORMS)}
PENALTY = {f"penalty/weight_grad_norm{end}" for end in ("", "/weight", "/norm")}
PROMISED = {"train/loss", "train/loss_total", *NORMS, *PENALTY, *EVALUATED}


def strictly(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_metrics_are_returned_and_written(run):
    metrics, folder = run
    assert metrics.keys() == PROMISED
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    text = (folder / "metrics.json").read_text()
    assert json.loads(text, parse_constant=strictly) == metrics
    assert metrics["test/acc"] > 0.7
    parts = metrics["train/loss"] + metrics["penalty/weight_grad_norm"]
    assert metrics["train/loss_total"] == pytest.approx(parts)


def test_what_is_not_finite_is_null(tmp_path):
    write_metrics(tmp_path, {"test/loss": math.nan, "wasserstein/raw": -math.inf, "test/acc": 0.5})
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=strictly)
    assert written == {"test/loss": None, "wasserstein/raw": None, "test/acc": 0.5}


def test_checkpoints_are_there_and_plain(run):
    for name in ("last", "best"):
        state = torch.load(run[1] / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert state["gpkit_penalties"].keys() == {"weight_grad_norm"}


def test_tensorboard_has_every_scalar(run, events):
    assert set(events.Tags()["scalars"]) >= PROMISED
    for name in PROMISED:
        last = events.Scalars(name)[-1].value
        assert last == pytest.approx(run[0][name], rel=1e-5), name
    assert len(events.Scalars("train/loss")) == 6 * 4  # epochs times batches
    assert len(events.Scalars("val/loss")) == 6


def test_tensorboard_has_the_histograms(events):
    found = set(events.Tags()["histograms"])
    assert found == {"penalty/weight_grad_norm/norm/histogram", "grad_norm/input/histogram"}
    first, second = events.Histograms("grad_norm/input/histogram")
    assert (first.step, second.step) == (4, 24)  # the ends of epochs 1 and 6
    assert first.histogram_value.num == 256  # every sample of the epoch
    batches = events.Histograms("penalty/weight_grad_norm/norm/histogram")[0]
    assert batches.histogram_value.num == 4


def test_the_penalty_lowers_what_it_penalises(run, tmp_path):
    options = [*SMALL, "trainer.max_epochs=6", "optimizer.lr=0.01"]
    strong = gpkit.train([*options, "penalty.weight=3"], tmp_path)
    none = gpkit.train([*options, "penalty=none"], tmp_path)
    norms = [metrics["test/grad_norm/weight"] for metrics in (none, run[0], strong)]
    assert norms[0] > norms[1] > 1.3 * norms[2]
    assert none["penalty/none"] == 0


def test_a_seed_is_a_run(tmp_path):
    options = [*SMALL, "trainer.max_epochs=1", "penalty=jacobian"]
    first, again, other = (gpkit.train([*options, f"seed={s}"], tmp_path) for s in (1, 1, 2))
    assert first == again
    assert first["train/loss"] != other["train/loss"]


UNSTABLE = ["optimizer=sgd", "optimizer.lr=1"]  # the best epoch comes early


@pytest.mark.parametrize("optimizer", [["optimizer=adam"], UNSTABLE], ids=["adam", "best early"])
def test_a_resumed_run_is_the_run(optimizer, tmp_path):
    options = [*SMALL, *optimizer, "penalty=jacobian"]  # a penalty that draws random numbers
    whole = gpkit.train([*options, "trainer.max_epochs=5"], tmp_path / "whole")
    gpkit.train([*options, "trainer.max_epochs=3"], tmp_path / "part")
    checkpoint = tmp_path / "part/checkpoints/last.ckpt"
    resumed = [*options, "trainer.max_epochs=5", f"ckpt_path={checkpoint}"]
    assert gpkit.train(resumed, tmp_path / "resumed") == whole
    assert (tmp_path / "part/checkpoints/best.ckpt").is_file()


def test_a_run_into_the_same_folder_replaces_the_one_before(tmp_path):
    for epochs in (1, 2):
        gpkit.train([*SMALL, f"trainer.max_epochs={epochs}"], tmp_path)
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_checkpoint_that_is_tested(which, tmp_path):
    options = ["penalty=none", *UNSTABLE, "trainer.max_epochs=4"]
    metrics = gpkit.train([*SMALL, *options, f"test_checkpoint={which}"], tmp_path)
    losses = {}
    for name in ("best", "last"):
        state = torch.load(tmp_path / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]
        net = MLP((1, 8, 8), 10, width=32)
        net.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
        data = Digits(train_size=256)
        data.setup("fit")
        x, y = data.test_set.tensors
        losses[name] = F.cross_entropy(net(x), y).item()
    assert losses["best"] != pytest.approx(losses["last"], rel=1e-2)
    assert metrics["test/loss"] == pytest.approx(losses[which], rel=1e-4)


@pytest.mark.parametrize("size", ["data.test_size=0", "data.val_size=0"])
def test_a_part_of_the_data_may_be_missing(size, tmp_path, capsys):
    metrics = gpkit.train([*SMALL, "trainer.max_epochs=1", size], tmp_path)
    missing, shown = ("test/", "val/") if "test" in size else ("val/", "test/")
    ends = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert f"{shown}acc" in ends
    assert ("tested" in ends) == (shown == "test/")
    content = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    found = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {m.name.tag for m in found.metric_infos} == {k for k in metrics if k.startswith(shown)}
    assert metrics.keys() == {name for name in PROMISED if not name.startswith(missing)}
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "checkpoints/last.ckpt").is_file()


def test_a_schedule_as_a_weight(tmp_path):
    weight = "penalty.weight={_target_:gpkit.warmup,weight:1.0,steps:10}"
    metrics = gpkit.train([*SMALL, weight, "trainer.max_epochs=2"], tmp_path)
    assert metrics["penalty/weight_grad_norm/weight"] == pytest.approx(0.8)  # the 8th step


# Every config runs.


@pytest.mark.parametrize("penalty", names("penalty"))
def test_every_penalty(penalty, tmp_path):
    on = ["penalty.weight=1.0"] if penalty == "fishr" else []  # its own is zero at first
    if penalty in ("wgan_gp", "wgan_lp", "dragan", "eikonal"):  # a slope of one output
        on = ["+penalty.of={_target_:hydra.utils.get_method,path:gpkit.axes.of.class_sum}"]
    if penalty in ("sobolev", "right_reasons"):  # they compare with an entry of the batch: here x
        name = "target" if penalty == "sobolev" else "mask"
        on = [f"penalty.{name}={{_target_:hydra.utils.get_method,path:modules.first}}"]
    if penalty == "sobolev":
        on += ["+penalty.of={_target_:hydra.utils.get_method,path:gpkit.axes.of.class_sum}"]
    metrics = gpkit.train([*FAST, f"penalty={penalty}", *on], tmp_path)
    assert all(math.isfinite(value) for value in metrics.values())
    weights = [v for k, v in metrics.items() if k.startswith("penalty/") and k.endswith("/weight")]
    assert weights
    assert all(weight > 0 for weight in weights) or penalty == "none"


DATA = [name for name in names("data") if name != "huggingface"]


# for the data of one experiment, with which they are tested
STUDIED = ("dirac", "point_critic", "distance_net")


OF_ANY = ("mlp", "gan_points")
OF_IMAGES = [m for m in names("model") if m not in (*STUDIED, *OF_ANY)]
FITTING = [*itertools.product(OF_ANY, DATA), *itertools.product(OF_IMAGES, ["digits"])]
FITTING.remove(("gan_points", "colored_digits"))  # a pair has no environments


def together(model, data):
    module = "gan" if model.startswith("gan_") else "penalized"
    return [*FAST, f"module={module}", f"model={model}", f"data={data}"]


@pytest.mark.parametrize(("model", "data"), FITTING)
def test_every_model_on_every_data_set(model, data, tmp_path):
    metrics = gpkit.train(together(model, data), tmp_path)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("model", OF_IMAGES)
def test_a_model_of_images_refuses_other_data(model, tmp_path):
    with pytest.raises(Exception, match=r"must be an image \(C, H, W\)"):
        gpkit.train(together(model, "diabetes"), tmp_path)


@pytest.mark.parametrize("optimizer", names("optimizer"))
def test_every_optimizer(optimizer, tmp_path):
    assert gpkit.train([*FAST, f"optimizer={optimizer}"], tmp_path)["train/loss"] > 0


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment(experiment, tmp_path):
    few = [f"++trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")]
    options = [*QUIET, f"experiment={experiment}", "trainer.max_epochs=1", *few]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("train", options)
    assert config.trainer.max_epochs == 1
    metrics = gpkit.train(options, tmp_path)
    assert all(math.isfinite(value) for value in metrics.values())


def test_label_noise_is_what_it_says(tmp_path):
    options = [*QUIET, "experiment=label_noise", "trainer.max_epochs=1"]
    metrics = gpkit.train(options, tmp_path)
    assert metrics["penalty/weight_grad_norm/weight"] == 1.0
    assert not any(name.startswith("val/") for name in metrics)


def test_a_regression(tmp_path):
    options = [*QUIET, "data=diabetes", "trainer.max_epochs=5", "penalty=input_grad_norm"]
    metrics = gpkit.train([*options, "penalty.weight=0.01"], tmp_path)
    assert {"test/mae", "val/mae"} <= metrics.keys()
    assert "test/acc" not in metrics
    assert metrics["test/loss"] < 0.8  # 1 is that of a constant
