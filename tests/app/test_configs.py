"""The configs say what they are, run as they say, and have the defaults of the functions."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

import gpkit
from gpkit.app.overrides import CONFIG_DIR, check_types
from gpkit.presets import PRESETS

pytestmark = pytest.mark.app

FILES = sorted(CONFIG_DIR.rglob("*.yaml"))
COMMAND = re.compile(r"python train\.py (.+?)(?:\s{2,}|$)", re.MULTILINE)
COMMANDS = [
    (path, line)
    for path in FILES
    for line in COMMAND.findall(path.read_text().replace("#", " "))
    if not line.startswith(("-", "search="))  # test_sweeps.py has these
]
FAST = ["device=cpu", "trainer=fast_dev_run", "trainer.enable_progress_bar=false"]


def name_of(path):
    return str(path.relative_to(CONFIG_DIR)) if isinstance(path, Path) else None


def header(path):
    """Return the comment that a file begins with."""
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, text in enumerate(lines) if not text.startswith("#"))])


@pytest.fixture(autouse=True)
def _hydra():
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_says_what_it_is(path):
    assert re.match(r"# (@package _global_\n# )?\S.+\.", header(path), re.DOTALL)


@pytest.mark.parametrize("path", [*CONFIG_DIR.glob("experiment/*.yaml")], ids=name_of)
def test_an_experiment_says_its_command_and_its_result(path):
    assert f"python train.py experiment={path.stem}" in header(path)
    assert "Expected" in header(path)


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=name_of)
@pytest.mark.usefixtures("graphs_alone")  # where a command compiles
def test_the_commands_in_the_files(path, line, tmp_path):
    overrides = shlex.split(line)
    config = compose("train", overrides)
    check_types(config, overrides)
    alone = line in (
        f"penalty={path.stem}",
        f"experiment={path.stem}",
    )  # test_training.py runs them
    if path.parent.name in ("penalty", "model", "module", "experiment") and not alone:
        GlobalHydra.instance().clear()
        metrics = gpkit.train([*overrides, *FAST, "trainer.max_epochs=1"], tmp_path)
        assert metrics.keys() & {"train/loss", "train/critic_loss"}
        assert all(math.isfinite(value) for value in metrics.values())


def test_there_are_commands():
    assert len(COMMANDS) > 15


def test_what_files_share_is_no_choice():
    # catches a shared file that lies in a group, where --help and every message would offer it
    assert {path.name for path in CONFIG_DIR.glob("_*.yaml")} == {
        f"_{name}.yaml" for name in ("data", "gaussians", "penalty")
    }
    assert not [*CONFIG_DIR.glob("*/_*")]


OWN_OPTIONS = {"approximate_r1", "approximate_r2", "cure", "fishr", "gnp", "irm", "sam"}


@pytest.mark.parametrize("preset", sorted({*PRESETS} - OWN_OPTIONS))
def test_every_penalty_takes_the_shared_options(preset):
    # catches a file without its line `defaults`
    shared = ["penalty.order=3", "penalty.every=4", "penalty.estimator=taylor"]
    config = compose("train", [f"penalty={preset}", *shared]).penalty
    assert (config.order, config.every, config.estimator) == (3, 4, "taylor")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_defaults_of_a_penalty_are_those_of_its_function(preset):
    config = compose("train", [f"penalty={preset}"]).penalty
    assert config._target_ == f"gpkit.{preset}"
    found, true = vars(instantiate(config, _convert_="all")), vars(PRESETS[preset]())
    if preset == "curvature":  # the application's default is the affordable estimator
        found.pop("estimator"), true.pop("estimator")
    assert found == true


@pytest.mark.parametrize("model", ["convnet", "mlp", "vit"])
def test_the_defaults_of_a_model_are_those_of_its_class(model):
    given = compose("train", [f"model={model}"]).model
    cls = type(instantiate(given, input_shape=(1, 8, 8), num_outputs=2))
    options = {k: v for k, v in given.items() if k != "_target_"}
    assert options == cls.__init__.__kwdefaults__


@pytest.mark.parametrize(
    ("module", "cls"), [("penalized", gpkit.PenalizedModule), ("gan", gpkit.GANModule)]
)
def test_the_defaults_of_a_module_are_those_of_its_class(module, cls):
    given = dict(compose("train", [f"module={module}"]).module)
    assert given.pop("_target_") == f"gpkit.{cls.__name__}"
    true = cls.__init__.__kwdefaults__
    assert given.pop("latent_dim", 16) == 16  # which has none
    assert given == {name: true[name] for name in given}
    assert true.keys() - given.keys() <= {"penalty", "optimizer", "scheduler", "seed", "metrics"}


@pytest.mark.parametrize(("model", "shape"), [("gan_points", (2,)), ("gan_images", (1, 8, 8))])
def test_the_defaults_of_a_pair_are_those_of_its_classes(model, shape):
    given = compose("train", [f"model={model}"]).model
    generator = instantiate(given.generator, latent_dim=3, output_shape=shape)
    critic = instantiate(given.critic, input_shape=shape)
    assert given.keys() == {"generator", "critic"}
    for part, net in (("generator", generator), ("critic", critic)):
        options = {k: v for k, v in given[part].items() if k != "_target_"}
        assert {**options, "num_classes": 0} == type(net).__init__.__kwdefaults__
    assert critic(generator(torch.zeros(5, 3))).shape == (5, 1)


@pytest.mark.parametrize(
    ("override", "keys", "names"),
    [
        ("penalty.wrt={_target_: gpkit.inputs, _args_: [a, b]}", ("a", "b"), ()),
        (
            "penalty.wrt=[{_target_: gpkit.activation, name: a}, "
            "{_target_: gpkit.activation, name: b}]",
            (),
            ("a", "b"),
        ),
    ],
)
def test_several_variables_in_a_config(override, keys, names):
    config = compose("train", ["penalty=custom", override])
    penalty = instantiate(config.penalty, _convert_="all")
    assert penalty.wrt.keys == keys
    assert getattr(penalty.wrt, "names", ()) == names
