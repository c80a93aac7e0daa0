"""Style and types are clean; importing gpkit loads nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join
)
def test_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import gpkit", ["torch", "hydra", "pytorch_lightning"]),
        ("import gpkit.app.cli", ["torch", "pytorch_lightning"]),
        ("import gpkit; gpkit.weight_grad_norm", ["hydra", "pytorch_lightning", "torchmetrics"]),
    ],
)
def test_import_loads_no_more_than_it_needs(statement, absent):
    code = f"import sys; {statement}; assert not set({absent}) & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
