"""Results of runs that are dead, alive, or of another sort, and how a run's end is recorded."""

import sys
from pathlib import Path

import pytest
from torch import nn

import gpkit
from gpkit.app.overrides import short
from gpkit.app.result import Result, best, write_json
from gpkit.app.sweep import claim

pytestmark = pytest.mark.app

FAST = ["device=cpu", "trainer=fast_dev_run", "trainer.enable_progress_bar=false"]


class Broken(nn.Sequential):
    """A net of ten outputs that does not run."""

    def __init__(self, num_outputs):
        super().__init__(nn.Flatten(), nn.Linear(64, num_outputs))

    def forward(self, x):
        raise RuntimeError("the power is gone")


def made(folder, **options):
    result = Result({"seed": 0, "penalty": {"_target_": "gpkit.r1"}}, **options)
    result.write(folder)
    return result


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
        gpkit.train([*options, f"model._target_={__name__}.Broken"], tmp_path)
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


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})

    def half(self, text):
        self.write_bytes(text[:3].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert path.read_text() == '{\n  "a": 1\n}\n'
