"""Runs that do not end well: signals, wrong checkpoints, processes that die."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

import gpkit
from gpkit.app.checkpoints import WholeFiles
from gpkit.app.result import Result

pytestmark = pytest.mark.app

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["device=cpu", "trainer.enable_progress_bar=false", "data.train_size=256", "model.width=16"]


class NetWithDropout(nn.Sequential):
    def __init__(self, input_shape, num_outputs):
        super().__init__(
            nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, num_outputs)
        )


def checkpoint(folder, name="last"):
    return torch.load(Path(folder) / f"checkpoints/{name}.ckpt", weights_only=True)


def weights(folder):
    return checkpoint(folder)["state_dict"]


class StopAt(Callback):
    """Sends a signal to this process during a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [7, 5], ids=["end of an epoch", "within an epoch"])
def test_a_resumed_run_is_the_run_with_dropout_and_workers(step, workers, tmp_path):
    options = [
        *QUIET[:3],
        f"model._target_={__name__}.NetWithDropout",
        "penalty=jacobian",
        f"data.num_workers={workers}",
        "trainer.max_epochs=4",
    ]
    stop = [f"+callbacks.stop._target_={__name__}.StopAt", f"+callbacks.stop.step={step}"]
    whole = gpkit.train(options, tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        gpkit.train([*options, *stop], tmp_path / "part")
    assert stopped.value.code == 130
    assert checkpoint(tmp_path / "part")["global_step"] == step + 1
    go_on = f"ckpt_path={tmp_path / 'part/checkpoints/last.ckpt'}"
    resumed = gpkit.train([*options, go_on], tmp_path / "resumed")
    torch.testing.assert_close(
        weights(tmp_path / "resumed"), weights(tmp_path / "whole"), rtol=0, atol=0
    )
    assert resumed == whole


def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, command):
    words = [sys.executable, ROOT / "train.py", *QUIET, "trainer.max_epochs=10000"]
    process = subprocess.Popen(
        words, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/*/*/checkpoints/last.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors + out
    again = said(errors, "SIGTERM; go on")
    found = torch.load(again[-1].partition("=")[2], weights_only=True)
    assert found["global_step"] > 0
    code, _, errors = command(*again, f"trainer.max_epochs={found['epoch'] + 1}")
    assert (code, errors) == (0, "")
    assert len(list(tmp_path.glob("outputs/*/*/metrics.json"))) == 1


def said(errors, words):
    """Return the command that the last line of the errors gives, after some words."""
    line = errors.strip().splitlines()[-1]
    assert line.startswith(f"stopped by {words} with: python train.py "), errors
    return shlex.split(line.partition("python train.py ")[2])


class SignalAt(Callback):
    """Sends Ctrl-C to this process in a hook."""

    def __init__(self, hook):
        setattr(self, hook, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.parametrize(
    ("hook", "left"),
    [
        ("setup", None),
        ("on_train_batch_start", "go on"),
        ("on_validation_start", "the training has ended, test it"),  # of the only epoch
        ("on_test_start", "the training has ended, test it"),
    ],
)
def test_ctrl_c_at_any_time_is_one_line(hook, left, command):
    # catches a signal that is swallowed after the last step, and one that shows a traceback
    stop = [f"+callbacks.stop._target_={__name__}.SignalAt", f"+callbacks.stop.hook={hook}"]
    options = [*QUIET, "penalty=sum", "penalty.parts={r1:{weight:1}}", "trainer.max_epochs=1"]
    code, _, errors = command(*options, *stop)
    assert (code, errors.count("\n")) == (130, 1)
    assert not list(Path().glob("outputs/*/*/metrics.json"))
    if left is None:
        assert errors == "stopped by SIGINT; no checkpoint was written\n"
        return
    again = [word for word in said(errors, f"SIGINT; {left}") if "callbacks.stop" not in word]
    if hook != "on_validation_start":  # whose command is that of the test
        code, out, errors = command(*again)
        assert (code, errors) == (0, "")
        assert "test/acc" in out


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"epoch": 1}, path)

    def half(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    words = r"cannot write the checkpoint .*last\.ckpt: No space .*; the one before is kept"
    with pytest.raises(OSError, match=words):
        WholeFiles().save_checkpoint({"epoch": 2}, path)
    assert torch.load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def killed_while_writing(checkpoint, file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_run_that_is_killed_while_it_writes_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"epoch": 1}, path)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(torch, "save", killed_while_writing)
        WholeFiles().save_checkpoint({"epoch": 2}, path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert torch.load(path) == {"epoch": 1}
    assert len(os.listdir(tmp_path)) == 2
    WholeFiles().save_checkpoint({"epoch": 3}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]  # the half one is gone


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    gpkit.train([*QUIET, "penalty=none", "trainer.max_epochs=2"], folder)
    return folder / "checkpoints/last.ckpt"


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def with_a_schedule(path):
    saved = torch.load(path, weights_only=True)
    saved["gpkit_config"]["scheduler"] = {
        "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "_partial_": True,
        "T_max": 3,
    }
    torch.save(saved, path)


WRONG = {
    "truncated": (cut, [], r"last\.ckpt is damaged, or no checkpoint: .*beside it there are best"),
    "text": (lambda p: p.write_text("x"), [], r"is damaged, or no checkpoint"),
    "weights alone": (lambda p: torch.save({"w": torch.ones(1)}, p), [], r"a file of torch\.save"),
    "another model": (
        None,
        ["model.width=8"],
        r"another model: net\.features\.0\.weight is \[16, 64\] there and \[8",
    ),
    "another optimizer": (None, ["optimizer=sgd"], r"another optimizer than SGD: .*betas"),
    "another rate": (
        None,
        ["optimizer.lr=0.1"],
        r"a run whose optimizer\.lr was 0\.003: 0\.1 would have no effect; leave it as it was",
    ),
    "another schedule": (
        with_a_schedule,
        ["scheduler=cosine"],
        r"scheduler\.T_max was 3: 8 would have no .*trainer\.max_epochs too, or scheduler=none",
    ),
    "the run has ended": (None, [], r"has 2 of 2 epochs: set trainer\.max_epochs to more"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_that_does_not_fit_is_named(what, finished, tmp_path):
    spoil, options, words = WRONG[what]
    path = tmp_path / "checkpoints/last.ckpt"
    path.parent.mkdir()
    for name in ("last", "best"):
        (path.parent / f"{name}.ckpt").write_bytes(finished.read_bytes())
    if spoil is not None:
        spoil(path)
    with pytest.raises(ValueError, match=words) as error:
        gpkit.train(
            [*QUIET, "penalty=none", "trainer.max_epochs=2", *options, f"ckpt_path={path}"],
            tmp_path / "again",
        )
    assert "\n" not in str(error.value)


def test_what_differs_from_the_checkpoint_is_said_and_the_time_adds_up(finished, tmp_path, capsys):
    saved = torch.load(finished, weights_only=True)
    assert 0 < saved["gpkit_seconds"] < 600
    torch.save({**saved, "gpkit_seconds": 1000.0}, tmp_path / "last.ckpt")
    options = ["penalty=jacobian", "model.dropout=0.5", "trainer.max_epochs=3"]
    gpkit.train([*QUIET, *options, f"ckpt_path={tmp_path / 'last.ckpt'}"], tmp_path / "on")
    out = capsys.readouterr().out
    assert f"goes on from {tmp_path / 'last.ckpt'} with other options: " in out
    assert "model.dropout was 0.0 and is 0.5" in out
    assert "penalty._target_ was gpkit.none and is gpkit.jacobian" in out
    assert "max_epochs was" not in out
    assert 1000 < Result.read(tmp_path / "on").seconds < 1600
    assert checkpoint(tmp_path / "on")["gpkit_seconds"] > 1000


def test_a_folder_for_a_checkpoint_is_told_with_the_file_in_it(finished):
    for folder in (finished.parent, finished.parents[1]):
        with pytest.raises(FileNotFoundError, match=rf"is a folder: give ckpt_path={finished}"):
            gpkit.train([*QUIET, f"ckpt_path={folder}"])


def test_the_metrics_stay_strict_json(finished):
    assert json.loads((finished.parents[1] / "metrics.json").read_text())["val/acc"] > 0


class Killed(NetWithDropout):
    """A net whose second process is killed in its third step."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 3 and int(os.environ.get("LOCAL_RANK", "0")) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_a_rank_that_is_killed_is_told(strategy, tmp_path):
    words = [f"model._target_={Path(__file__).stem}.Killed", "penalty=none", "data.batch_size=16"]
    words += ["device=ddp", "device.accelerator=cpu", f"device.strategy={strategy}", QUIET[1]]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *words],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    assert "error: a process of the run died: killed, or out of memory" in done.stderr, done.stderr
