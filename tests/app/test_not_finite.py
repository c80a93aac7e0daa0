"""A loss, a penalty or a gradient that is not finite stops the run, which names it."""

import json
import re
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

import gpkit
from gpkit.app.callbacks.guard import NonFiniteError
from gpkit.app.result import Result
from gpkit.data import TwoMoons

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false", "data.train_size=256", "model.width=16"]


class NetWithDropout(nn.Sequential):
    def __init__(self, input_shape, num_outputs):
        super().__init__(
            nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, num_outputs)
        )


class Loud(NetWithDropout):
    """A net with large outputs."""

    def forward(self, x):
        return 100 * super().forward(x)


class RootAtZero(nn.Module):
    """A net whose gradient is infinite where its output is finite."""

    def __init__(self, input_shape, num_outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x):
        return self.scale.sqrt() + x.flatten(1)[:, :1] * 0


class RootInSlope(nn.Module):
    """A net whose slope is √shift where a pixel is 0: at shift 0 that of the slope is infinite."""

    def __init__(self, input_shape, num_outputs):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(num_outputs))

    def forward(self, x):
        return (x.flatten(1)[:, :1] + self.shift) ** 1.5


class SometimesNaN(NetWithDropout):
    """A net that is NaN where the image is bright."""

    def forward(self, x):
        return super().forward(x) + torch.where(bright(x), torch.nan, 0.0)[:, None]


class SometimesSteep(nn.Module):
    """A net with a gradient that is infinite where the image is bright."""

    def __init__(self, input_shape, num_outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x):
        dark = self.scale.expand(len(x), -1)
        return torch.where(bright(x)[:, None], dark.abs().sqrt(), dark) if any(bright(x)) else dark


def bright(x):
    return x.flatten(1).mean(1) > 0.33


class TurnsNaN(TwoMoons):
    """Data of which three samples turn NaN in the third epoch."""

    def setup(self, stage=None):
        super().setup(stage)
        x = self.train_set.tensors[0]
        loader, epochs = self.train_dataloader, []

        def train_dataloader():
            made = loader()
            original = made.__class__.__iter__

            def iterate(self):
                epochs.append(1)
                if len(epochs) == 3:
                    x[:3] = torch.nan
                return original(self)

            made.__class__ = type("Loader", (made.__class__,), {"__iter__": iterate})
            return made

        self.train_dataloader = train_dataloader


class BadValidation(TwoMoons):
    """Data with a validation sample that is NaN."""

    def setup(self, stage=None):
        super().setup(stage)
        self.val_set.tensors[0][0] = torch.nan


class BadTest(TwoMoons):
    """Data with a test sample that is NaN."""

    def setup(self, stage=None):
        super().setup(stage)
        self.test_set.tensors[0][0] = torch.nan


def checkpoint(folder, name="last"):
    return torch.load(Path(folder) / f"checkpoints/{name}.ckpt", weights_only=True)


def weights(folder):
    return checkpoint(folder)["state_dict"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    words = r"train/loss is (nan|inf).* at step \d+ in epoch 0: .*smaller optimizer\.lr"
    with pytest.raises(NonFiniteError, match=words):
        gpkit.train([*QUIET, "penalty=none", "optimizer.lr=1e30", "trainer.max_epochs=2"], tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_a_penalty_that_is_not_finite_is_named(tmp_path):
    options = [f"model._target_={__name__}.Loud", "penalty=jacobian", "penalty.weight=3e38"]
    with pytest.raises(NonFiniteError, match=r"penalty/jacobian is inf.* at step 0 in epoch 0"):
        gpkit.train([*QUIET[:3], *options, "trainer.max_epochs=1"], tmp_path)


OF_GRADIENT = {
    "RootAtZero": ("none", r"net\.scale is .*: that of the losses of 64 of 64 samples"),
    "SometimesSteep": ("none", r"net\.scale is .*: that of the losses of {bad} of 64 samples"),
    "RootInSlope": ("jacobian", r"net\.shift is .*: that of penalty/jacobian,"),
}


class ToZero(Callback):
    """Sets the weights to zero before the second step."""

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == 1:
            module.net.shift.data.zero_()


class Seen(Callback):
    """Keeps the batch."""

    batch = None

    def on_train_batch_start(self, trainer, module, batch, *_):
        Seen.batch = batch

    @staticmethod
    def bright():
        """Return how many images are bright: some, and not all."""
        count = int(bright(Seen.batch[0]).sum())
        assert 0 < count < 64
        return count


SEEN = [f"+callbacks.seen._target_={__name__}.Seen"]


@pytest.mark.parametrize("net", OF_GRADIENT)
def test_a_gradient_that_is_not_finite_is_named(net, tmp_path):
    penalty, words = OF_GRADIENT[net]
    options = [f"model._target_={__name__}.{net}", f"penalty={penalty}", "trainer.max_epochs=1"]
    if penalty != "none":  # the first step looks at the penalty's gradient itself
        options += [f"+callbacks.zero._target_={__name__}.ToZero"]
    with pytest.raises(NonFiniteError) as error:
        gpkit.train([*QUIET[:3], *SEEN, *options], tmp_path)
    assert re.match("the gradient of " + words.format(bad=Seen.bright()), str(error.value))


def test_the_samples_whose_losses_are_not_finite_are_counted(tmp_path):
    options = [f"model._target_={__name__}.SometimesNaN", "penalty=none", "trainer.max_epochs=1"]
    with pytest.raises(NonFiniteError, match=r", at step 0 in epoch 0: the data are fin") as error:
        gpkit.train([*QUIET[:3], *SEEN, *options], tmp_path)
    told = f"train/loss is nan (the losses of {Seen.bright()} of 64 samples)"
    assert str(error.value).startswith(told)


def test_data_that_turn_nan_leave_the_last_good_checkpoint(tmp_path):
    options = [f"data._target_={__name__}.TurnsNaN", "data=two_moons", "trainer.max_epochs=5"]
    words = r"train/loss is nan.* in epoch 2: \d of \d+ samples of the batch have a value that is"
    with pytest.raises(NonFiniteError, match=words) as error:
        gpkit.train([*QUIET, *options, "penalty=none"], tmp_path)
    assert str(error.value).endswith("last.ckpt")
    assert checkpoint(tmp_path)["epoch"] == 1
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_a_validation_loss_that_is_not_finite_is_named(tmp_path):
    options = [f"data._target_={__name__}.BadValidation", "data=two_moons", "trainer.max_epochs=1"]
    words = r"val/loss is nan, though the weights are finite.*look at the validation data"
    with pytest.raises(NonFiniteError, match=words):
        gpkit.train([*QUIET, *options, "penalty=none"], tmp_path)


def test_a_test_loss_that_is_not_finite_is_named_and_the_run_is_kept(tmp_path):
    options = [f"data._target_={__name__}.BadTest", "data=two_moons", "trainer.max_epochs=1"]
    words = r"test/loss is nan, though the weights are finite: look at the test data"
    with pytest.raises(NonFiniteError, match=words):
        gpkit.train([*QUIET, *options, "penalty=none"], tmp_path)
    result = Result.read(tmp_path)
    assert (result.status, result.metrics["test/loss"]) == ("failed", None)
    assert result.metrics["val/loss"] > 0
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics


def test_a_gan_stops_too(tmp_path):
    options = [
        "experiment=wgan_gp_8gaussians",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=4",
    ]
    with pytest.raises(NonFiniteError, match=r"(loss|wgan_gp) is (nan|inf|-inf)"):
        gpkit.train([*QUIET[:2], *options, "optimizer.lr=1e30"], tmp_path)
