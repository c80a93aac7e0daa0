"""What is found in folders: runs, and those that are missing, failed or killed."""

import json

import pytest

from gpkit.report.read import find


def test_a_partly_finished_sweep(put, place, dead):
    swept = {"penalty": ["none", "r1", "r2"], "seed": ["0", "1"]}
    put("none", 0.1, 0)
    put("none", 0.1, 1, status="failed", error="the power is gone")
    put("r1", 0.1, 0, status="running", pid=dead)
    put("r1", 0.1, 1, status="running", pid=1)
    put("r2", 0.1, 0, status="interrupted")
    (place / "sweep.json").write_text(json.dumps({"overrides": [], "swept": swept}))
    found = find([place])
    assert [run.result.varied["penalty"] for run in found.runs] == ["none"]
    assert found.counts == {
        "finished": 1,
        "failed": 1,
        "killed": 1,
        "running": 1,
        "interrupted": 1,
        "missing": 1,
    }
    assert sorted(found.problems) == [
        "study/none-0.1-1 failed: the power is gone",
        "study/r1-0.1-0 was killed: its process is gone",
        "study/r1-0.1-1 is running",
        "study/r2-0.1-0 was interrupted",
        "study: penalty=r2 seed=1 has not run",
    ]


def test_a_run_on_another_machine_may_be_dead(put, place):
    put(status="running", host="node7")
    assert find([place]).problems == ["study/none-0.1-0 is running on node7, or was killed there"]


def test_what_is_the_same_counts_once(put, place):
    put("none", 0.1, 0, {"test/acc": 0.1}, "old/0", started="2026-01-01T00:00:00")
    put("none", 0.3, 0, {"test/acc": 0.2}, "new/0", started="2026-01-02T00:00:00")
    put("none", 0.5, 0, folder="new/1", status="same", same_as="0")
    found = find([place])
    assert [run.result.metrics["test/acc"] for run in found.runs] == [0.2]  # the newest
    assert found.counts == {"finished": 1, "twice": 1, "same": 1}
    assert not found.problems


@pytest.mark.parametrize(("trials", "missing"), [(None, 0), (1, 0), (4, 3)])
def test_a_search_says_how_many_trials_are_missing(trials, missing, put, place):
    put("r1", 0.1, 0)
    note = {"overrides": [], "swept": {"penalty.weight": None}}
    note |= {} if trials is None else {"trials": trials}  # an older one does not say
    (place / "sweep.json").write_text(json.dumps(note))
    found = find([place])
    assert found.counts["missing"] == missing
    assert found.problems == [f"study: {missing} of {trials} trials have not run"] * bool(missing)


def test_a_damaged_result_loses_no_other(put, place):
    put("r1", 0.1, 0)
    (put("r1", 0.1, 1) / "result.json").write_text("{")
    (place / "sweep.json").write_text("[]")
    found = find([place])
    assert len(found.runs) == 1
    first, second = found.problems
    assert first.startswith("study/r1-0.1-1/result.json is no result of a run:")
    assert second.startswith("study/sweep.json does not describe a sweep:")


def test_a_folder_of_one_run(put):
    assert len(find([put("r1", 0.1, 0)]).runs) == 1


WRONG = {
    "nowhere": r"nowhere: no such folder; give the folder of a run or of a sweep",
    "file": r"file: a file, no folder",
    "empty": r"empty: no result.json in it or below; give",
    "old": r"old: no result.json in it or below; a metrics.json of an older version",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_without_runs_is_told(name, place):
    from pathlib import Path

    Path("file").touch()
    Path("empty").mkdir()
    Path("old").mkdir()
    Path("old/metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=WRONG[name]):
        find([Path(name)])
