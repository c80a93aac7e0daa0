"""Data of the user's own, and nets, losses and targets that do not fit."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gpkit
from gpkit.app.overrides import explain

pytestmark = pytest.mark.app

FAST = ["device=cpu", "trainer=fast_dev_run", "trainer.enable_progress_bar=false", "penalty=none"]
GAN = ["module=gan", "model=gan_points", "penalty=wgan_gp", *FAST[:3]]
X, Y = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


class Bare(pl.LightningDataModule):
    """Loaders, and nothing else; it takes none of the options of digits but one."""

    def __init__(self, batch_size=8, x=X, y=Y, drop_last=False):
        super().__init__()
        self.size, self.parts, self.drop_last = batch_size, (x, y), drop_last

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.parts), self.size, drop_last=self.drop_last)


class Whole(Bare):
    """What a run needs."""

    def setup(self, stage=None):
        self.input_shape, self.num_outputs, self.task = (5,), 3, "classification"
        if stage == "test":
            self.tested = TensorDataset(*self.parts)

    def val_dataloader(self):
        return self.train_dataloader()

    def test_dataloader(self):
        return DataLoader(self.tested, self.size)


class Loaderless(pl.LightningDataModule):
    pass


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0], Y[0]


class Stream(Whole):
    def train_dataloader(self):
        return DataLoader(Endless(), self.size)


class Fixed(nn.Linear):
    """A net that asks for nothing."""

    def __init__(self):
        super().__init__(5, 3)


class Flat(nn.Linear):
    """A net of one output [B]."""

    def __init__(self):
        super().__init__(5, 1)

    def forward(self, x):
        return super().forward(x)[:, 0]


def own(name):
    return f"{__name__}.{name}"


def train(folder, *options):
    return gpkit.train([*FAST, *options], folder)


def test_data_of_your_own_get_the_options_that_they_take(tmp_path, capsys):
    metrics = train(tmp_path, f"data._target_={own('Whole')}", "data.batch_size=16")
    assert {"val/acc", "test/acc"} <= metrics.keys()
    assert "Whole, 32 train, 32 val, 32 test" in capsys.readouterr().out


def test_data_that_the_net_and_the_loss_ask_nothing_of(tmp_path, capsys):
    options = [f"data._target_={own('Bare')}", f"model._target_={own('Fixed')}"]
    metrics = train(tmp_path, *options, "loss._target_=torch.nn.CrossEntropyLoss")
    assert "train/loss" in metrics
    assert "Bare, 32 train\n" in capsys.readouterr().out


def test_data_without_a_length_need_a_limit(tmp_path):
    data = f"data._target_={own('Stream')}"
    with pytest.raises(ValueError, match=r"Stream: the training set has no length: give .*limit"):
        train(tmp_path, data, "trainer=default")
    assert "test/acc" in train(tmp_path, data)  # fast_dev_run has a limit


def test_options_that_were_set_must_be_taken(tmp_path):
    with pytest.raises(Exception, match="unexpected keyword argument 'label_noise'"):
        train(tmp_path, f"data._target_={own('Whole')}", "data.label_noise=0.1")


REFUSED = {
    "lacking": (
        [f"data._target_={own('Bare')}"],
        r"Bare lacks input_shape: the shape.*; num_outputs: the number.*; task: \"class",
    ),
    "no loader": (
        [f"data._target_={own('Loaderless')}"],
        r"Loaderless lacks train_dataloader\(\); inp",
    ),
    "no data module": (["data._target_=builtins.dict"], "LightningDataModule; got a dict"),
    "fewer outputs": (
        ["+model.num_outputs=3"],
        "MLP has 3 outputs, and the labels of Digits go from 0 to 9: it needs 10 outputs",
    ),
    "no classes": (
        [f"data._target_={own('Whole')}", f"model._target_={own('Flat')}"],
        r"Flat gives \[2\] for 2 samples; cross-entropy takes \[2, classes\]",
    ),
    "numbers for classes": (
        ["data=diabetes", "loss._target_=torch.nn.CrossEntropyLoss"],
        "cross-entropy takes classes, and the targets of Diabetes are numbers: use .*MSELoss",
    ),
    "classes for numbers": (
        ["loss._target_=torch.nn.MSELoss"],
        "MSELoss takes numbers, and the targets are classes: leave the loss out",
    ),
    "each with each": (
        ["data=diabetes", "model=mlp", "+model.num_outputs=2"],
        r"MLP gives \[2, 2\] and the targets are \[2, 1\]: MSELoss would compare",
    ),
    "another shape": (
        [f"data._target_={own('Whole')}", "+model.input_shape=[7]"],
        r"MLP does not take the data, x \[2, 5\]: mat1 and mat2 shapes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(what, tmp_path):
    options, words = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=words) as error:
        train(tmp_path, *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Whole(y=Y + 1), "Whole says num_outputs 3, and its labels go beyond"),
        (Whole(y=Y - 1), "go from -1 to 1: labels must begin at 0"),
        (Whole(x=X[:0], y=Y[:0]), "Whole: the training set is empty"),
        (Whole(batch_size=33, drop_last=True), "has 32 samples, fewer than a batch, and drop_last"),
    ],
)
def test_bad_samples_are_refused(data, words, tmp_path, monkeypatch):
    monkeypatch.setattr("gpkit.app.data.instantiate", lambda made: data)
    with pytest.raises(ValueError, match=words):
        train(tmp_path)


def test_labels_that_the_loss_ignores_do_not_count(tmp_path, monkeypatch):
    data = Whole(y=torch.where(Y == 2, -100, Y))
    monkeypatch.setattr("gpkit.app.data.instantiate", lambda made: data)
    assert "train/loss" in train(tmp_path)


def test_a_pair_needs_the_shape_alone(tmp_path):
    class_ = f"data._target_={own('Bare')}"
    with pytest.raises(
        ValueError, match=r"Bare lacks input_shape: the shape of one x, as"
    ) as error:
        gpkit.train([*GAN, class_], tmp_path)
    assert "task" not in str(error.value)


def test_the_check_draws_no_random_numbers(tmp_path, monkeypatch):
    """Else it would change the run."""
    first = train(tmp_path, "trainer.max_epochs=1", "model.dropout=0.2")
    monkeypatch.setattr("gpkit.app.train.require_fit", lambda module, data: None)
    assert train(tmp_path, "trainer.max_epochs=1", "model.dropout=0.2") == first


def test_an_option_that_the_trainer_does_not_take_is_told_with_the_nearest(command):
    code, _, errors = command(*FAST, "+trainer.loger=x")
    assert code == 1
    assert "no option 'loger' (did you mean 'logger'?)" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "Connection closed by peer [127.0.0.1]:4242",
        "read: Connection reset by peer",
        "process 1 terminated with signal SIGKILL",
    ],
)
def test_a_process_that_died_is_told(text):
    told = explain(RuntimeError(text), [])
    assert told == f"a process of the run died: killed, or out of memory ({text})"
