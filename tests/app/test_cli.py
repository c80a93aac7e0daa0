"""The command line: what is promised works, and every mistake is told in one line."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpkit

pytestmark = pytest.mark.app

ROOT = Path(__file__).resolve().parents[2]
FAST = ["device=cpu", "trainer=fast_dev_run", "trainer.enable_progress_bar=false"]
HINT = "(HYDRA_FULL_ERROR=1 shows the traceback)"


def written(folder="outputs/*/*"):
    """Return the metrics of the one run in the current folder."""
    (path,) = Path().glob(f"{folder}/metrics.json")
    return json.loads(path.read_text())


# What is promised.


@pytest.mark.filterwarnings("ignore:.*random estimate of n²")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model=mlp penalty=weight_grad_norm", {"weight_grad_norm": 0.01}),
        ("penalty=jacobian penalty.weight=0.03 seed=1", {"jacobian": 0.03}),
        (
            "model=mlp penalty=weight_grad_norm device=cpu penalty.order=2 penalty.weight=0.02",
            {"weight_grad_norm": 0.02},
        ),
        ("penalty=sum penalty.parts=[r1,r2]", {"r1": 10.0, "r2": 10.0}),
        ("penalty=sum penalty.parts={r1:{weight:2},jacobian:null}", {"r1": 2.0, "jacobian": 0.01}),
        ("penalty=custom penalty.at=perturb penalty.form=norm", {"penalty": 0.01}),
        ("penalty=weight_grad_norm penalty.match=head.*", {"weight_grad_norm": 0.01}),
        ("penalty=curvature penalty.estimator=exact model.width=8", {"curvature": 0.01}),
    ],
)
def test_promised_command_lines(words, expected, command):
    code, _, errors = command(*FAST, *words.split())
    assert (code, errors) == (0, "")
    metrics = written()
    weights = {name: metrics[f"penalty/{name}/weight"] for name in expected}
    assert weights == pytest.approx(expected)
    assert {name for name in metrics if name.endswith("/weight") and "penalty" in name} == {
        f"penalty/{name}/weight" for name in expected
    }


def test_the_end_says_where_everything_is(command):
    code, out, _ = command(*FAST)
    assert code == 0
    (folder,) = Path.cwd().glob("outputs/*/*")
    lines = [line.split() for line in out.splitlines() if line]
    metrics = written()
    tested = [[k, f"{v:.4f}"] for k, v in metrics.items() if k.startswith("test/")]
    assert len(tested) == 4
    assert lines[-9:] == [
        *tested,
        ["options", *FAST],
        ["tested", str(folder / "checkpoints/best.ckpt")],
        ["metrics", str(folder / "metrics.json")],
        ["checkpoints", str(folder / "checkpoints")],
        ["TensorBoard", "tensorboard", "--logdir", str(folder)],
    ]
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_net_in_the_current_folder(command):
    Path("my_package.py").write_text(
        "from torch import nn\n"
        "class MyNet(nn.Sequential):\n"
        "    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    code, _, errors = command(*FAST, "model._target_=my_package.MyNet")
    assert (code, errors) == (0, "")
    assert written()["test/acc"] >= 0


@pytest.fixture
def configs():
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/mine.yaml").write_text("_target_: gpkit.models.MLP\nwidth: 5\ntilt: 1\n")


CONFIG_DIR = ["--config-dir", "conf"]


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_config_of_your_own(place, command, configs):
    words = [*FAST, "model=mine", "~model.tilt"]
    code, _, errors = command(*words[:place], *CONFIG_DIR, *words[place:])
    assert (code, errors) == (0, "")
    (path,) = Path().glob("outputs/*/*/checkpoints/last.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state["net.head.weight"].shape == (10, 5)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model=mime", "there is no model 'mime' (did you mean 'mine'?)"),
        (
            "model.tild=3",
            "no option 'tild' of model (did you mean 'tilt'?); there are _target_, wid",
        ),
        ("model.width=a", "model.width must be an integer, like its default 5; got 'a'"),
    ],
)
def test_mistakes_beside_a_config_of_your_own(word, told, command, configs):
    words = ["model=mine", word] if "." in word else [word]
    code, _, errors = command(*CONFIG_DIR, *FAST, *words)
    assert code == 1
    assert told in errors
    assert errors.count("\n") == 1


# Mistakes.

GAN = "module=gan model=gan_points"
WRONG = {  # command line: what the one line of the error says, in this order
    "penalti=none": ["no group 'penalti'", "did you mean 'penalty=none'?"],
    "penalty=jacobain": ["no penalty 'jacobain'", "did you mean 'jacobian'?", "curvature, custom"],
    "model=mpl": ["no model 'mpl'", "mean 'mlp'?", "convnet, dirac, distance_net, gan_images"],
    "experiment=label_nose": ["experiment=label_nose", "did you mean 'label_noise'?"],
    "penalty=null": ["penalty must be one of", "wgan_gp", "got null"],
    "penalty=[jacobian,r1]": ["got [jacobian,r1]", "penalty=sum 'penalty.parts=[jacobian,r1]'"],
    "penalty=none,jacobian": ["Ambiguous value", "add --multirun"],
    "~penalty": ["no 'penalty'", "leave out ~penalty"],
    "penalty.wieght=1": ["penalty.wieght", "did you mean 'weight'?", "there are", "every"],
    "trainer.max_epoch=3": ["no option 'max_epoch' of trainer", "did you mean 'max_epochs'?"],
    "sede=1": ["no option 'sede'", "did you mean 'seed'?"],
    "optimiser.lr=1": ["no 'optimiser' to set", "did you mean 'optimizer'?"],
    "+model.heads=3": ["unexpected keyword argument 'heads'"],
    "+model.widht=3": ["takes no option 'widht' (did you mean 'width'?)"],
    "penalty.weight=abc": ["penalty.weight must be a number", "0.01", "got 'abc'"],
    "penalty.weight=-1": ["`weight=...` must be a number >= 0", "got -1"],
    "penalty.weight=nan": ["`weight=...` must be a number >= 0", "got nan"],
    "penalty.order=0": ["`order=...` must be an integer >= 1", "got 0"],
    "penalty.order=1.5": ["penalty.order must be an integer", "got 1.5"],
    "penalty.every=0": ["`every=...` must be an integer >= 1", "got 0"],
    "penalty.scope=smaple": ["`scope=...` must be one of 'batch', 'sample'", "mean 'sample'?"],
    "penalty.estimator=exakt": ["must be one of 'exact', 'projection'", "did you mean 'exact'?"],
    "penalty.match=haed.*": ["`weights('haed.*')` matches none of 6", "did you mean 'head."],
    "penalty=custom penalty.form=sqared": ["must be one of 'squared'", "mean 'squared'?"],
    "penalty=custom penalty.at=interpolat": ["must be one of 'data'", "mean 'interpolate'?"],
    "penalty=sum penalty.parts=[jacobain]": ["must be one of 'none'", "mean 'jacobian'?"],
    "penalty=sum penalty.parts={r1:{wieght:1}}": [
        "has no argument 'wieght' (did you mean 'weight'?)"
    ],
    "penalty=curvature model.activation=relu": ["piecewise-linear net (Relu)", "GELU"],
    "trainer.max_epochs=abc": ["trainer.max_epochs must be an integer", "got 'abc'"],
    "trainer.max_epochs=0": ["`trainer.max_epochs` must be an integer >= 1", "got 0"],
    "trainer.deterministic=3": ["trainer.deterministic must be true or false", "got 3"],
    "trainer.precision=8": ["Precision 8 is invalid", "bf16-mixed"],
    "optimizer.lr=fast": ["optimizer.lr must be a number", "got 'fast'"],
    "optimizer.lr=-1": ["`optimizer.lr` must be a number >= 0", "got -1"],
    "model.width=0": ["`MLP(width=...)` must be an integer >= 1", "got 0"],
    "model.activation=rellu": ["must be one of 'gelu'", "got 'rellu'", "did you mean 'relu'?"],
    "model._target_=nowhere.Net": ["_target_=nowhere.Net", "No module named 'nowhere'"],
    "model._target_=gpkit.models.MPL": ["gpkit.models has no 'MPL'", "did you mean 'MLP'?"],
    "model._target_=builtins.dict": ["must give a torch.nn.Module", "got a dict"],
    "loss._target_=torch.nn.CrossEntropy": ["has no 'CrossEntropy'", "mean 'CrossEntropyLoss'?"],
    "model=vit model.patch_size=3": ["must divide the image side 8", "use 1, 2, 4 or 8"],
    "model=convnet data=diabetes": ["must be an image (C, H, W)", "use `MLP`"],
    "data.batch_size=0": ["`Digits(batch_size=...)` must be an integer >= 1", "got 0"],
    "data.batch_size=big": ["data.batch_size must be an integer", "got 'big'"],
    "data.label_noise=2": ["label_noise=2", "[0, 1]"],
    "data.train_size=5000": ["fit into the 1797 samples", "5000 + 269 + 269"],
    "module=gna": ["no module 'gna'", "did you mean 'gan'?", "there are gan, penalized"],
    "module=gan": ["trains a generator and a critic", "gpkit.models.MLP", "model=gan_points"],
    "model=gan_points": ["gpkit.PenalizedModule trains one net", "generator and critic", "=gan"],
    "module=gan module.compiled=true": ["no option 'compiled' of module", "'compile'"],
    f"{GAN} data=diabetes model=gan_images": ["must be an image (C, H, W)", "`PointGenerator`"],
    f"{GAN} penalty=irm": ["'irm' compares environments", "use PenalizedModule"],
    f"{GAN} penalty=fisher": ["'fisher' draws labels from a classifier's", "weight_grad_norm"],
    f"{GAN} penalty=per_sample_grad_norm": ["needs the loss of each sample", "scope='batch'"],
    f"{GAN} penalty=curvature": ["piecewise-linear net (Relu)", "softplus"],
    f"{GAN} module.loss=hnige": ["must be one of 'wasserstein'", "did you mean 'hinge'?"],
    f"{GAN} module.latent_dim=0": ["latent_dim=...", "must be an integer >= 1", "got 0"],
    f"{GAN} module.ema=1": ["`ema=...` must be a number in [0, 1)", "got 1"],
    f"{GAN} module.critic_optimizer=adam": ["function of parameters", "Adam", "got 'adam'"],
    f"{GAN} module.critic_scheduler=exp": ["function of an optimiser", "got 'exp'"],
    f"{GAN} module.conditional=true data=diabetes": ["must be called without labels"],
    f"{GAN} loss._target_=torch.nn.MSELoss": ["loss._target_=torch.nn.MSELoss", "module.loss="],
    f"{GAN} trainer.accumulate_grad_batches=2": ["one optimiser", "module.accumulate=2"],
    f"{GAN} trainer.gradient_clip_val=0.5": ["one optimiser", "module.gradient_clip=0.5"],
    "+callbacks.mine=3": ["callbacks.mine must give a pytorch_lightning Callback", "got a int"],
    "+callbacks.mine._target_=builtins.dict": ["callbacks.mine must give", "got a dict"],
    "data=huggingface": ["data.path must be given"],
    "seed=-1": ["`seed` must be an integer >= 0", "got -1"],
    "test_checkpoint=first": ["must be one of 'best', 'last'", "got 'first'"],
    "ckpt_path=nowhere.ckpt": ["ckpt_path=nowhere.ckpt", "no such file", "checkpoints/last.ckpt"],
    "device.strategy=dpp": ["strategy='dpp'", "ddp"],
    "penalty.weight=[1": ["cannot read an override", "key=value"],
    "penalty.weight": ["cannot read an override", "missing EQUAL", "key=value"],
    "": ["cannot read an override", "key=value"],
    "--config-dir nowhere": ["nowhere' not found"],
    "-m seed=0 penalty=none,jacobain": ["no penalty 'jacobain'", "did you mean 'jacobian'?"],
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_told_in_one_line(words, command):
    code, _, errors = command(*FAST, *(words.split(" ")))
    assert code == 1
    assert errors.count("\n") == 1, errors
    assert errors.startswith("error: ")
    assert errors.endswith(f" {HINT}\n")
    places = [errors.find(said) for said in WRONG[words]]
    assert -1 not in places, errors
    assert places == sorted(places)
    assert not list(Path().glob("**/metrics.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_gpu_that_is_not_there(command):
    code, _, errors = command("device=gpu")
    assert code == 1
    assert "needs a CUDA device; found none: use device=cpu" in errors


def test_the_traceback_is_there_when_asked_for(command, monkeypatch):
    """The error is Python's to show: it is neither caught nor told in a line."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0; got -1"):
        command(*FAST, "seed=-1")


@pytest.mark.parametrize("module", ["gpkit", "gpkit.app.cli"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import")
def test_a_module_is_the_command(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpkit", "--version"])
    runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out == f"gpkit {gpkit.__version__}\n"


SHOW = """
import atexit, sys
from gpkit.app.cli import main
atexit.register(lambda: print("torch" in sys.modules))
main()
"""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--help"], "penalty: amp, approximate_r1, approximate_r2"),
        (["--help"], "model._target_=my_package.MyNet"),
        (["--cfg", "job"], "_target_: gpkit.weight_grad_norm"),
        (["--cfg", "job", "penalty=r1"], "_target_: gpkit.r1"),
    ],
)
def test_what_only_shows_something_loads_no_torch(words, told, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", SHOW, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert told in process.stdout
    assert process.stdout.endswith("False\n")
    assert not list(tmp_path.iterdir())
