"""Sweeps: each job leaves its result, a failed one loses no other, a second run does the rest."""

import json
import os
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from swept import BRITTLE, FAST, SWEEP, results

import gpkit
from gpkit.app.result import Result
from gpkit.app.sweep import say_end
from gpkit.report.curves import curves_of

pytestmark = pytest.mark.app


def test_every_job_leaves_its_result(command):
    words = ["penalty=none,weight_grad_norm", "seed=0,1", "model.width=16"]
    code, out, errors = command("-m", *FAST, SWEEP, *words)
    assert (code, errors) == (0, "")
    found = results()
    varied = [(r["varied"]["penalty"], r["varied"]["seed"]) for r in found.values()]
    assert varied == [
        ("none", 0),
        ("none", 1),
        ("weight_grad_norm", 0),
        ("weight_grad_norm", 1),
    ]
    last = found[3]
    (folder,) = Path("sweep").glob("3-*")
    assert folder.name == "3-penalty=weight_grad_norm,seed=1"  # not what all jobs share
    assert last["status"] == "finished"
    assert last["error"] is None
    assert last["metrics"] == json.loads((folder / "metrics.json").read_text())
    assert last["config"]["penalty"]["weight"] == 0.01
    assert last["config"]["model"]["width"] == 16
    assert last["choices"]["data"] == "digits"
    assert last["parameters"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert 0 < last["seconds"] < 100
    assert 1 < last["cost_in_plain_steps"] < 20
    assert 0.4 < found[0]["cost_in_plain_steps"] < 2.5  # without a penalty
    assert [r["metrics"]["train/loss"] for r in found.values()][::2] == pytest.approx(
        [found[0]["metrics"]["train/loss"]] * 2  # the penalty changes nothing before the first step
    )
    assert found[0]["metrics"]["train/loss"] != found[1]["metrics"]["train/loss"]
    note = json.loads(Path("sweep/sweep.json").read_text())
    assert note["swept"] == {"penalty": ["none", "weight_grad_norm"], "seed": ["0", "1"]}
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[3][1:4]] == ["3", "weight_grad_norm", "1"]
    losses = [r["metrics"]["val/loss"] for r in found.values()]
    job = found[losses.index(min(losses))]["varied"]
    words = f"best val/loss {min(losses):.4f}: penalty={job['penalty']} seed={job['seed']}"
    assert words in " ".join(out.split())
    assert "python -m gpkit.report sweep" in out


def test_a_job_that_fails_loses_no_other_and_only_it_runs_again(command):
    words = ["-m", *BRITTLE, "model.width=3,5,4", "penalty=none", "seed=0"]
    code, out, errors = command(*words)
    assert code == 1
    lines = errors.splitlines()
    assert lines[0].startswith("error: device=cpu trainer=fast_dev_run")  # the job, at once
    assert lines[0].endswith("the power is gone (HYDRA_FULL_ERROR=1 shows the traceback)")
    assert lines[1] == "error: 1 of 3 jobs did not finish:"
    assert lines[2] == "  sweep/1-model.width=5: the power is gone"
    assert lines[3].endswith("hydra.sweep.dir=sweep runs only these again")
    assert len(lines) == 4
    first = results()
    assert [r["status"] for r in first.values()] == ["finished", "failed", "finished"]
    assert (first[1]["error"], first[1]["metrics"]) == ("the power is gone", {})
    assert "failed" in out

    Path("repaired").touch()
    code, out, errors = command(*words)
    assert (code, errors) == (0, "")
    assert out.count("done before") == 2
    second = results()
    assert [r["status"] for r in second.values()] == ["finished"] * 3
    for job in (0, 2):
        assert second[job] == first[job]


def test_a_traceback_is_there_when_asked_for_and_the_sweep_goes_on(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, errors = command("-m", *BRITTLE, "model.width=5,4", "penalty=none")
    assert code == 1
    assert "Traceback (most recent call last)" in errors
    assert [r["status"] for r in results().values()] == ["failed", "finished"]


def test_no_penalty_is_one_run_whatever_its_weight(command):
    words = ["penalty=none,jacobian", "penalty.weight=0.1,0.3", "seed=0"]
    code, out, errors = command("-m", *FAST, SWEEP, *words)
    assert (code, errors) == (0, "")
    found = results()
    assert [r["status"] for r in found.values()] == ["finished", "same", "finished", "finished"]
    assert found[1]["same_as"] == "0-penalty.weight=0.1,penalty=none"
    assert found[0]["varied"] == found[1]["varied"] == {"penalty": "none"}
    assert found[3]["varied"] == {"penalty": "jacobian", "penalty.weight": 0.3}
    assert len(list(Path("sweep").glob("*/metrics.json"))) == 3
    assert "same as 0" in out
    (row,) = [line for line in out.splitlines() if "same as 0" in line]
    assert f"{found[0]['metrics']['test/acc']:.4f}" in row


def test_a_larger_grid_runs_only_what_is_new(command):
    command("-m", *FAST, SWEEP, "penalty=none", "seed=0,1")
    old = {path: path.read_text() for path in Path("sweep").glob("*/result.json")}
    code, out, errors = command("-m", *FAST, SWEEP, "penalty=none,jacobian", "seed=0,1")
    assert (code, errors) == (0, "")
    assert out.count("done before") == 2
    assert all(path.read_text() == text for path, text in old.items())
    new = [Result.read(path) for path in Path("sweep").iterdir() if path.is_dir()]
    jacobian = [r for r in new if r.varied.get("penalty") == "jacobian"]
    assert [r.status for r in jacobian] == ["finished", "finished"]


# A sweep that was stopped: which of its jobs are missing.


def note(swept, trials=None):
    place = Path("sweep")
    place.mkdir()
    found = {"overrides": [], "swept": swept, "trials": trials}
    (place / "sweep.json").write_text(json.dumps(found))
    return place


def put(place, number, words, status="finished"):
    metrics = {"val/loss": 1.0} if status == "finished" else {}
    Result({}, words, status=status, metrics=metrics).write(place / f"{number}-{','.join(words)}")


def test_the_jobs_that_a_stopped_sweep_has_not_run_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = note({"penalty": ["none", "r1"], "seed": ["0", "1"]})
    put(place, 0, ["penalty=none", "seed=0"])
    put(place, 1, ["penalty=none", "seed=1"], "interrupted")
    assert say_end(place) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: 3 of 4 jobs did not finish:",
        "  sweep/1-penalty=none,seed=1: interrupted",
        "  not run: penalty=r1 seed=0",
        "  not run: penalty=r1 seed=1",
        "The same command with hydra.sweep.dir=sweep runs only these again, from their last "
        "checkpoint if they were stopped",
    ]


def test_a_stopped_search_says_how_many_trials_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = note({"penalty.weight": None}, trials=5)
    put(place, 0, ["penalty.weight=0.1"])
    put(place, 1, ["penalty.weight=0.2"])
    assert say_end(place) == 3
    errors = capsys.readouterr().err
    assert "error: 3 of 5 jobs did not finish:\n  not run: a trial (3 times)\n" in errors
    for number in (2, 3, 4):
        put(place, number, [f"penalty.weight={number}"])
    assert say_end(place) == 0


# A job that was stopped goes on where it was.


class StopAt(pl.Callback):
    """Sends Ctrl-C to this process during a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


SHORT = ["device=cpu", "trainer.enable_progress_bar=false", "data.train_size=128", "model.width=8"]
SHORT += [
    "trainer.log_every_n_steps=1",
    "model.dropout=0.3",
    "trainer.max_epochs=3",
    "penalty=jacobian",
]  # two steps an epoch


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def pretend_killed(folder, dead):
    """Make the result that of a process that is gone."""
    result = Result.read(folder)
    result.status, result.pid, result.metrics = "running", dead, {}
    result.write(folder)


@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_a_job_that_was_stopped_goes_on_bit_for_bit(end, command, dead):
    whole = gpkit.train([*SHORT, "seed=1"], "whole")
    stop = [f"+callbacks.stop._target_={__name__}.StopAt", "+callbacks.stop.step=2"]
    words = ["-m", *SHORT, *stop, SWEEP, "seed=1,2"]
    code, _, errors = command(*words)
    assert code == 130
    assert errors.endswith("from their last checkpoint if they were stopped\n")
    first = Path("sweep/0-seed=1")
    assert torch.load(first / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    if end == "killed":
        pretend_killed(first, dead)
    code, out, _ = command(*words)  # the second job is stopped too
    assert code == 130
    assert out.count(f"goes on from {first.absolute()}/checkpoints/last.ckpt: the job was sto") == 1
    assert Result.read(first).metrics == whole
    torch.testing.assert_close(weights(first), weights(Path("whole")), rtol=0, atol=0)


def test_a_job_that_was_killed_after_its_last_epoch_is_only_tested(command, dead):
    words = ["-m", *SHORT, SWEEP, "seed=1,2"]
    assert command(*words)[0] == 0
    first = Path("sweep/0-seed=1")
    before, steps = Result.read(first), len(curves_of(first)["train/loss"][0])
    pretend_killed(first, dead)
    code, out, errors = command(*words)
    assert (code, errors) == (0, "")
    assert f"goes on from {first.absolute()}" in out
    after = Result.read(first)
    assert (after.metrics, after.tested) == (before.metrics, before.tested)
    assert len(curves_of(first)["train/loss"][0]) == steps
