"""Each file of examples/ runs, and prints the numbers that its header promises."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]

# What is printed, and the bounds of its number.
EXPECTED = {
    "wgan_gp_loop": {
        "modes covered": (4, 4),
        "share of samples on a mode": (0.3, 1),
        "mean slope": (0.8, 1.3),
    },
    "r1_lightning": {
        "mean radius": (0.85, 1.15),
        "standard deviation of the radius": (0.02, 0.3),
        "largest empty sector": (0, 20),
        "squared slope on real points": (0, 0.1),
    },
    "signed_distance": {
        "error of the distance": (0, 0.03),
        "error of the slope": (0, 0.1),
        "error of the distance without the term": (0.05, 1),
    },
    "robust_classifier": {
        "clean accuracy without the penalty": (0.93, 1),
        "attacked accuracy without the penalty": (0.05, 0.26),
        "clean accuracy with the penalty": (0.93, 1),
        "attacked accuracy with the penalty": (0.29, 1),
    },
    "robot_policy": {
        "slope of D without the penalty": (0.27, 1),
        "slope of D with the penalty": (0.1, 0.24),
        "style reward of recorded motion": (0.7, 1),
        "style reward of clumsy motion": (0, 0.65),
        "shake of the policy without the penalty": (4, 20),
        "shake of the policy with the penalty": (1, 3),
        "error of the policy without the penalty": (1.9, 2.2),
        "error of the policy with the penalty": (1.9, 2.3),
    },
    "forces": {
        "mean size of a force": (1.3, 1.5),
        "error after energies": (0.3, 1),
        "error after energies and forces": (0.05, 0.25),
    },
    "per_sample_gradients": {
        "largest relative difference from the loop": (0, 1e-4),
        "share of wrong labels": (0.7, 1),
    },
    "fsdp_critic": {
        "share of the weights": (0.45, 0.55),
        "largest difference": (0, 1e-12),
    },
}


def test_every_example_is_expected_and_linked():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(EXPECTED)
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"({name}.py)" in page for name in names)
    assert "(examples/README.md)" in (ROOT / "README.md").read_text()


def printed_by(name, capsys):
    """Run an example, and return what it prints: here, or in two processes."""
    path = str(EXAMPLES / f"{name}.py")
    if name != "fsdp_critic":
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("default")  # as where it is run by hand
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, path], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXPECTED)
def test_it_prints_what_its_header_promises(name, capsys):
    out = printed_by(name, capsys)
    printed = dict(re.findall(r"^(\D.*?) (-?[\d.]+(?:e[-+]?\d+)?)$", out, re.MULTILINE))
    assert set(printed) == set(EXPECTED[name])
    for line, (low, high) in EXPECTED[name].items():
        assert low <= float(printed[line]) <= high, (line, printed[line])


@pytest.mark.parametrize("name", EXPECTED)
def test_it_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert 30 <= len(text.splitlines()) <= 80
    header = text.split('"""')[1]
    assert f"examples/{name}.py  " in header
    assert "It prints" in header
