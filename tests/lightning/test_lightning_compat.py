"""What gpkit takes of Lightning and torchmetrics beside their public API is there.

A test that fails here names the entry of gpkit/lightning/compat.py that a release has changed, and
what goes wrong in gpkit without it.
"""

import copy
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from fits import batches, fit
from modules import Plain
from nets import net
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins import MixedPrecision

import gpkit
from gpkit.checks import is_a
from gpkit.lightning import compat
from gpkit.lightning.watch.replay import Silencer


def require(there, entry, without):
    """Fail with the entry, the releases, and what goes wrong."""
    versions = f"Lightning {pl.__version__}, torchmetrics {torchmetrics.__version__}"
    assert there, f"compat.{entry} is not as it was in {versions}: {without}"


def test_callback():
    lightning = pytest.importorskip("lightning.pytorch")
    require(
        issubclass(compat.Callback, pl.Callback)
        and issubclass(compat.Callback, lightning.Callback),
        "Callback",
        "the trainer of one of the packages does not call gpkit's callbacks",
    )
    assert isinstance(gpkit.GradientNormMonitor(), lightning.Callback)


FOLDER = """
import importlib.machinery, importlib.util
real = importlib.util.find_spec
def found(name):  # as for a folder without an __init__.py
    return importlib.machinery.ModuleSpec(name, None) if name == "lightning" else real(name)
importlib.util.find_spec = found
import pytorch_lightning as pl
from gpkit.lightning.compat import Callback
assert Callback.__bases__ == (pl.Callback,), Callback.__bases__
"""


def test_a_folder_named_lightning_is_not_taken_for_the_package():
    done = subprocess.run([sys.executable, "-c", FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "TensorBoardLogger"]
)
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_is_a(package, name):
    library = pytest.importorskip(package)
    home = library.loggers if name.endswith("Logger") else library.strategies
    kind = getattr(home, name, None)
    require(kind is not None, f"is_a(..., {name!r})", "what cannot work is not refused in time")
    assert is_a(kind.__new__(kind), name)
    assert not is_a(kind.__new__(kind), "SingleDeviceStrategy")


def test_trainer_of():
    module, trainer = pl.LightningModule(), object()
    without = "a module with penalties cannot be called without a trainer"
    require(compat.trainer_of(module) is None, "trainer_of", without)
    module._trainer = trainer
    assert module.trainer is trainer
    assert compat.trainer_of(module) is trainer


def test_scaler_of():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    trainer = pl.Trainer(accelerator="cpu", plugins=[plugin], logger=False, barebones=True)
    scaler = compat.scaler_of(trainer)
    require(
        scaler is plugin.scaler is not None,
        "scaler_of",
        "float16 penalties and norms are taken of scaled gradients",
    )
    assert compat.scale_of(scaler, torch.device("cpu")) == scaler.get_scale() == 8
    assert compat.scaler_of(None) is compat.scale_of(None, torch.device("cpu")) is None


class Logger(DummyLogger):
    """Keeps the steps under which the trainer logs its numbers."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, metrics, step=None):
        if "loss" in metrics:
            self.steps.append(step)


class Ask(pl.Callback):
    """Asks what compat says of each micro-batch."""

    def __init__(self):
        self.last, self.logs, self.own, self.ahead, self.steps = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.logs.append(compat.logs_now(trainer))
        self.ahead.append(compat.logs_now(trainer, ahead=2))
        self.own.append(trainer._logger_connector.should_update_logs)
        self.steps.append(compat.steps_of(trainer))

    def on_after_backward(self, trainer, pl_module):
        self.last.append(compat.last_of_step(trainer))


class Logs(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.fixture(scope="module")
def asked():
    """Return what was asked in a fit of two epochs, each of 2 + 2 + 1 micro-batches."""
    ask, logger = Ask(), Logger()
    fit(
        Logs(net()),
        ask,
        batches(5),
        epochs=2,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        logger=logger,
    )
    return ask, logger


def test_last_of_step(asked):
    ask, _ = asked
    require(
        ask.last == [False, True, False, True, True] * 2,
        "last_of_step",
        "penalties and norms of a step come too early or not at all under accumulation",
    )


def test_steps_of(asked):
    ask, logger = asked
    assert ask.steps == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    logged = [
        step for step, last, now in zip(ask.steps, ask.last, ask.logs, strict=True) if last and now
    ]
    require(
        logger.steps == logged == [1, 3, 5],
        "steps_of",
        "histograms are at other steps than the trainer's numbers",
    )


def test_logs_now(asked):
    ask, _ = asked
    require(
        ask.logs == ask.own,
        "logs_now",
        "norms and penalties are computed on steps that are not logged, or not on those that are",
    )
    assert ask.ahead == [True] * 10  # of two steps in a row one is


def test_state_key():
    class Mine(compat.Callback):
        """Any callback."""

    keys = {compat.state_key(Mine(), what=what) for what in ("a", "b")}
    require(
        len(keys) == 2 and all("Mine" in key for key in keys),
        "state_key",
        "of two callbacks one loses its state in a checkpoint",
    )
    assert compat.state_key(Mine(), what="a") in keys


METRICS = {
    "mean": torchmetrics.MeanMetric,
    "error": torchmetrics.MeanAbsoluteError,
    "cat": torchmetrics.CatMetric,
    "confusion": torchmetrics.classification.BinaryConfusionMatrix,
}
PAIR = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0])


def use(metric, how):
    data = (
        PAIR[:1] if isinstance(metric, (torchmetrics.MeanMetric, torchmetrics.CatMetric)) else PAIR
    )
    if how == "forward":
        metric(*data)
    else:
        metric.update(*data)
    metric.compute()


def same(one, other):
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("how", ["forward", "update"])
@pytest.mark.parametrize("kind", METRICS)
def test_metric_state(kind, how):
    metric = METRICS[kind]()
    states, caches = compat.metric_state(metric, caches=False), compat.metric_state(metric)
    require(states, "metric_state", "metrics in inference mode cannot be written to any more")
    require(
        set(compat.METRIC_CACHES) - {"_update_called"} <= set(caches),
        "METRIC_CACHES",
        "a training step that is run again is counted twice in its metrics",
    )
    before = {k: copy.deepcopy(v) for k, v in metric.__dict__.items()}
    use(metric, how)
    changed = {k for k, v in metric.__dict__.items() if not same(v, before.get(k))}
    require(
        changed <= set(caches),
        f"METRIC_CACHES, without {sorted(changed - set(caches))}",
        "what a training step that is run again leaves in its metrics stays there",
    )
    assert changed & set(states)


@pytest.mark.parametrize("how", ["forward", "update"])
@pytest.mark.parametrize("kind", METRICS)
def test_a_step_that_is_run_again_leaves_no_trace_in_metrics(kind, how):
    module = pl.LightningModule()
    module.metric = METRICS[kind]()
    use(module.metric, how)
    before = copy.deepcopy(compat.metric_state(module.metric))
    with Silencer(module).silenced():
        use(module.metric, how)
    after = compat.metric_state(module.metric)
    assert after.keys() == before.keys()
    assert all(same(after[k], before[k]) for k in before)
