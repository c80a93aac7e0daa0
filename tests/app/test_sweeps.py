"""Sweeps: each job leaves its result, a failed one loses no other, a second run does the rest."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from torch import nn

import gpkit
from gpkit.app.overrides import CONFIG_DIR, short
from gpkit.app.result import Result, best
from gpkit.app.sweep import claim
from gpkit.report.curves import curves_of

pytestmark = pytest.mark.app

ROOT = Path(__file__).resolve().parents[2]
FAST = ["device=cpu", "trainer=fast_dev_run", "trainer.enable_progress_bar=false"]
SWEEP = "hydra.sweep.dir=sweep"


class Brittle(nn.Sequential):
    """A net of ten outputs that does not run at some widths, unless a file is there."""

    def __init__(self, num_outputs, width=3):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_outputs))
        self.width = width

    def forward(self, x):
        if self.width == 5 and not Path("repaired").exists():
            raise RuntimeError("the power is gone")
        return super().forward(x)


BRITTLE = [*FAST, f"model._target_={__name__}.Brittle", SWEEP]


def strictly(constant):
    raise AssertionError(f"{constant} is not JSON")


def results():
    """Return the results of the sweep by job number, as plain JSON."""
    paths = sorted(Path("sweep").glob("*/result.json"))
    return {
        int(path.parent.name.partition("-")[0]): json.loads(
            path.read_text(), parse_constant=strictly
        )
        for path in paths
    }


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


# Results of runs that are dead, alive, or of another sort.


def made(folder, **options):
    result = Result({"seed": 0, "penalty": {"_target_": "gpkit.r1"}}, **options)
    result.write(folder)
    return result


@pytest.fixture(scope="module")
def dead():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_that_was_killed_is_told_from_one_that_runs(tmp_path, dead):
    assert made(tmp_path).state == "running"
    assert made(tmp_path, pid=dead).state == "killed"
    assert made(tmp_path, pid=dead, host="elsewhere").state == "running"  # who knows
    assert made(tmp_path, pid=dead, status="failed").state == "failed"


def test_a_job_claims_what_no_other_has_done(tmp_path, dead):
    new = Result({"seed": 0, "penalty": {"_target_": "gpkit.r1"}})
    made(tmp_path / "0", pid=dead)  # killed
    assert claim(tmp_path / "1", new) is None
    assert Result.read(tmp_path / "1").status == "running"
    made(tmp_path / "0", pid=1)  # at work, in another process
    assert claim(tmp_path / "1", new).same_as == "0"
    made(tmp_path / "0", status="failed")
    new = Result({"seed": 0, "penalty": {"_target_": "gpkit.r1"}})
    assert claim(tmp_path / "1", new) is None
    other = Result({"seed": 1, "penalty": {"_target_": "gpkit.r1"}})
    made(tmp_path / "0", status="finished")
    assert claim(tmp_path / "2", other) is None
    assert claim(tmp_path / "0", new).status == "finished"


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is no result of a run: Expecting"):
        Result.read(tmp_path)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_one_process_of_a_run_writes_the_result(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "1")
    made(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_error_and_a_signal_are_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*FAST, "penalty=none"]
    with pytest.raises(RuntimeError, match="power"):
        gpkit.train([*options, f"model._target_={__name__}.Brittle", "model.width=5"], tmp_path)
    failed = Result.read(tmp_path)
    assert (failed.status, failed.error) == ("failed", "the power is gone")
    monkeypatch.setattr("gpkit.app.train.check_values", lambda cfg: sys.exit(130))
    with pytest.raises(SystemExit):
        gpkit.train(options, tmp_path)
    assert Result.read(tmp_path).status == "interrupted"


def test_the_best_run_has_the_largest_accuracy_or_the_smallest_loss():
    runs = {
        "a": Result({}, metrics={"test/acc": 0.5, "test/loss": 0.5}),
        "b": Result({}, metrics={"test/acc": 0.9, "test/loss": 0.7}),
        "c": Result({}, metrics={"test/acc": None}),
    }
    assert best(runs, "test/acc") == "b"
    assert best(runs, "test/loss") == "a"


def test_long_names_stay_different():
    long = "penalty.match=head.*," * 10
    assert short(long + "seed=0") != short(long + "seed=1")
    assert len(short(long)) < 150


# Launchers.

TINY = [*FAST, SWEEP, "model.width=4", "penalty=none,weight_grad_norm", "seed=0"]


def compose_launcher(name, *options):
    pytest.importorskip(f"hydra_plugins.hydra_{name.partition('_')[0]}_launcher")
    words = [f"hydra/launcher={name}", *options]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", words, return_hydra_config=True).hydra.launcher


def test_slurm_takes_its_options():
    options = ["hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=30"]
    launcher = compose_launcher("submitit_slurm", *options)
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.timeout_min) == ("gpu", 30)


def test_a_package_that_is_missing_is_named(command):
    for option, package in (("hydra/sweeper=optuna", "hydra-optuna-sweeper"),):
        if find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
            code, _, errors = command("-m", *FAST, option, "seed=0,1")
            assert code == 1
            assert f"{option} needs a package: pip install {package} (" in errors


def searched(*options):
    """Return the composed sweeper of ``search=optuna``."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="an extra package")
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", ["search=optuna", *options], return_hydra_config=True).hydra


@pytest.mark.parametrize(
    ("metric", "way"), [("val/loss", "minimize"), ("val/acc", "maximize"), ("test/mae", "minimize")]
)
def test_a_search_goes_to_the_better_side(metric, way):
    found = searched(f"optimized_metric={metric}")
    assert found.mode == RunMode.MULTIRUN
    assert found.sweeper._target_.endswith("OptunaSweeper")
    assert found.sweeper.direction == way


@pytest.mark.filterwarnings("ignore")  # of Optuna 2 and what it needs
def test_a_search_goes_on_after_a_failure_and_where_it_stopped(command):
    searched()
    words = ["search=optuna", "hydra.sweeper.n_trials=4", *BRITTLE, "model.width=choice(4,5)"]
    code, out, errors = command(*words)
    assert code == 1
    first = results()
    states = [r["status"] for r in first.values()]
    assert len(states) == 4
    assert {"failed", "finished"} == {*states}
    assert f"{states.count('failed')} of 4 jobs did not finish" in errors
    assert json.loads(Path("sweep/sweep.json").read_text())["swept"] == {
        "penalty.weight": None,
        "model.width": None,
    }
    weights = [r["varied"]["penalty.weight"] for r in first.values()]
    assert len({*weights}) == 4
    assert all(0.01 <= w <= 10 for w in weights)
    assert "best    val/loss" in out

    Path("repaired").touch()
    code, out, errors = command(*words)
    assert code == 0, errors
    assert out.count("done before") >= 1
    done = [r for r in first.values() if r["status"] == "finished"]
    assert all(r in results().values() for r in done)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]], ids=lambda own: own[0]
)
def test_jobs_side_by_side(launcher, tmp_path, monkeypatch):
    compose_launcher(launcher[0])
    monkeypatch.chdir(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from gpkit.app.cli import main; main()"
    words = [*TINY, "data.batch_size=0,64", f"hydra/launcher={launcher[0]}", *launcher[1:]]
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    found = results()
    assert [r["status"] for r in found.values()] == ["failed", "finished"] * 2
    assert len({r["pid"] for r in found.values()}) > 1
    assert "best    val/loss" in done.stdout
    assert "2 of 4 jobs did not finish" in done.stderr


@pytest.mark.slow
@pytest.mark.ddp
def test_jobs_of_two_processes(tmp_path, monkeypatch):
    """ddp would run the sweep again in each of its processes: in a sweep it is ddp_spawn."""
    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if w != "device=cpu"] + ["device=ddp", "device.accelerator=cpu"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "-m", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = results()
    assert [r["status"] for r in found.values()] == ["finished"] * 2
    assert all(r["metrics"]["test/acc"] >= 0 for r in found.values())
    state = torch.load(next(Path("sweep").glob("1-*/checkpoints/last.ckpt")), weights_only=True)
    assert state["gpkit_penalties"].keys() == {"weight_grad_norm"}
