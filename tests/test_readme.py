"""Every block of the README, and of the pages with programs, runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import gpkit
from gpkit.app.overrides import CONFIG_DIR
from gpkit.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NAMES = ("loops.md", "fsdp.md", "doctor.md", "check_penalty.md")
PAGES = "".join((ROOT / "docs" / name).read_text() for name in NAMES)
PYTHON = re.findall(r"```python\n(.*?)```", README + PAGES, re.DOTALL)
SHELL = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if "train.py" in line
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.strip().splitlines()[-1][:30])
def test_python_block_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.app
@pytest.mark.parametrize("line", SHELL)
def test_command_composes(line, tmp_path):
    words = shlex.split(line.partition("train.py")[2], comments=True)
    overrides = [word for word in words if not word.startswith("-")]
    if "--config-dir" in words:
        overrides.remove("my_configs")
        overrides = [word.replace("model=mine", "model=mlp") for word in overrides]
    if "search=optuna" in words:  # a search sets the weight; without its package it cannot compose
        overrides = [w for w in overrides if not w.startswith(("search=", "penalty.weight=tag("))]
    sweeps = "-m" in words
    overrides = [word.split(",")[0] if sweeps else word for word in overrides]  # one job
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        compose("train", overrides)


def test_names_every_preset_and_group_choice():
    assert all(f"`{name}`" in README for name in PRESETS)
    for group in CONFIG_DIR.iterdir():
        if group.is_dir() and group.name != "penalty":
            assert all(f"`{f.stem}`" in README for f in group.glob("*.yaml")), group


def test_public_names_exist():
    assert all(getattr(gpkit, name) is not None for name in [*gpkit.__all__, "sum"])
    with pytest.raises(AttributeError, match="no attribute 'wgan'"):
        _ = gpkit.wgan


def test_the_first_commands_do_all_the_set_up():
    """Each is one line; CI takes the second from the page."""
    lines = [line.partition("   #")[0] for line in README.splitlines() if " && " in line]
    assert lines[:2] == [
        "pip install . && python train.py model=mlp penalty=weight_grad_norm",
        "pip install -e '.[dev]' && python -m pytest -n 2",
    ]
