"""Jobs side by side, on a cluster, of several processes; and a search in place of a grid."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from swept import BRITTLE, FAST, SWEEP, results

from gpkit.app.overrides import CONFIG_DIR

pytestmark = pytest.mark.app

ROOT = Path(__file__).resolve().parents[2]
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
