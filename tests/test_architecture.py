"""The folders keep their order: imports run downward, files stay small, a call never goes back."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]


def run(*command, cwd=ROOT):
    return subprocess.run([*command], cwd=cwd, capture_output=True, text=True)


def test_the_import_contracts_are_kept():
    done = run(*LINT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "axes/form.py",
            "    from gpkit.penalty import Penalty",
            "gpkit.axes.form -> gpkit.penalty",
        ),
        ("presets/base.py", "    import hydra", "gpkit.presets.base -> hydra"),
        ("lightning/gan/ema.py", "    from gpkit.lightning.module import compiled", "gan.ema -> "),
    ],
    ids=["upward", "Hydra in the core", "between features"],
)
def test_an_import_that_breaks_a_contract_is_named(file, line, broken, tmp_path):
    """Also one for type checkers alone."""
    shutil.copytree(ROOT / "gpkit", tmp_path / "gpkit")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "gpkit" / file
    path.write_text(
        f"{path.read_text()}\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n{line}\n"
    )
    done = run(*LINT, cwd=tmp_path)
    assert done.returncode == 1
    assert broken in done.stdout


def test_files_and_folders_stay_small_and_without_circles():
    found = json.loads(run(sys.executable, "docs/imports.py", "--json").stdout)
    assert found["modules"] > 100
    assert not found["circles"]
    assert not found["files over 330 lines"]
    assert not found["folders with more than 14 files"]


def test_no_call_goes_back_into_a_file_that_is_still_running():
    done = run(sys.executable, "docs/walk.py")
    walks = re.findall(r"(\d+) files, (\d+) entries, (\d+) ways back", done.stdout)
    assert len(walks) == 6, done.stderr
    assert [back for *_, back in walks] == ["0"] * 6
    files = [int(count) for count, *_ in walks]
    assert files[1] <= 20  # wgan_gp, second call, of which five write out a double backward pass
    assert files[3] <= 15  # weight_grad_norm
    assert files[5] <= 31  # the callback's training step
