"""A net of the user's own, from a file beside the command."""

from pathlib import Path

import pytest
import torch

import gpkit

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false"]
SMALL = [*QUIET, "data.train_size=256", "trainer.log_every_n_steps=1"]
FAST = [*QUIET, "trainer=fast_dev_run"]
UNSTABLE = ["optimizer=sgd", "optimizer.lr=1"]  # the best epoch comes early

OWN = """
import math
from torch import nn

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

class Shaped(nn.Sequential):
    def __init__(self, input_shape, num_outputs):
        assert type(input_shape) is tuple
        super().__init__(nn.Flatten(), nn.Linear(math.prod(input_shape), num_outputs))

class Wide(nn.Sequential):
    def __init__(self, num_outputs, width=3):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_outputs))

class Anything(Shaped):
    def __init__(self, input_shape, num_outputs, **options):
        super().__init__(input_shape, num_outputs)
        print("options:", *sorted(options))

class Failing(Plain):
    calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls > 10:
            raise RuntimeError("the power is gone")
        return super().forward(x)

def make(num_outputs):
    return Shaped((1, 8, 8), num_outputs)

def number():
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    Path(tmp_path, "own_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *options: gpkit.train([*FAST, *options], tmp_path)


def parameters(folder):
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("net", "options", "count"),
    [
        ("Plain", [], 650),  # the options of model=mlp are not for it
        ("Shaped", [], 650),
        ("make", [], 650),
        ("Wide", ["model.width=5"], 5 * 65 + 10 * 6),
        ("Wide", ["+model.num_outputs=12", "model.width=5"], 5 * 65 + 12 * 6),
    ],
)
def test_a_net_of_your_own(net, options, count, own, tmp_path):
    own(f"model._target_=own_nets.{net}", *options)
    assert parameters(tmp_path) == count


def test_a_net_of_your_own_that_takes_any_option(own, capsys):
    own("model._target_=own_nets.Anything")
    assert "options: activation depth dropout noise width" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model._target_=own_nets.Plain", "model.width=5"], "unexpected keyword.*'width'"),
        (["model._target_=own_nets.Wide", "+model.heads=5"], "unexpected keyword.*'heads'"),
        (["model._target_=own_nets.number"], r"must give a torch\.nn\.Module; got a int"),
        (["model._target_=builtins.dict"], r"must give a torch\.nn\.Module; got a dict"),
        (["model._target_=own_nets.Pain"], "Pain' is importable"),
    ],
)
def test_a_net_of_your_own_that_does_not_fit(options, words, own):
    with pytest.raises(Exception, match=words):
        own(*options)


@pytest.mark.parametrize("size", [0, 64])
def test_every_epoch_leaves_a_checkpoint_to_go_on_from(size, own, tmp_path):
    options = [*SMALL, *UNSTABLE, "trainer=default", f"data.val_size={size}"]
    with pytest.raises(RuntimeError, match="the power is gone"):
        own(*options, "model._target_=own_nets.Failing")  # in the third epoch of 4 batches
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert (state["epoch"], state["global_step"]) == (1, 8)
