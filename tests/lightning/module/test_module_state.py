"""Around training: prediction, schedulers, checkpoints, and arguments that are refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from penalised import LR, SGD, WEIGHT, B, classes, mlp, trainer
from torch.utils.data import DataLoader

import gpkit
from gpkit.axes.of import class_sum


def test_prediction_is_what_the_net_gives():
    data = classes()
    module = gpkit.PenalizedModule(mlp(), F.cross_entropy)
    for loader in (DataLoader(data, B), DataLoader(data.tensors[0], B)):
        found = torch.cat(trainer().predict(module, loader))
        torch.testing.assert_close(found, module.net(data.tensors[0]))  # the batch sizes differ


def test_scheduler_steps_every_epoch():
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = gpkit.PenalizedModule(mlp(), F.cross_entropy, optimizer=SGD, scheduler=halve)
    runner = trainer(max_epochs=3)
    runner.fit(module, DataLoader(classes(), B))
    assert runner.optimizers[0].param_groups[0]["lr"] == LR / 8


def randomly_penalised(**more):
    penalty = {
        "j": gpkit.jacobian(0.2),
        "line": gpkit.wgan_gp(1.0, of=class_sum),
        "w": WEIGHT(every=3),
    }
    return gpkit.PenalizedModule(mlp(), F.cross_entropy, {**penalty, **more})


def test_a_resumed_run_is_the_run(tmp_path):
    loader = DataLoader(classes(), B)
    whole = randomly_penalised()
    trainer(max_epochs=3).fit(whole, loader)

    torch.manual_seed(0)
    half, runner = randomly_penalised(), trainer(max_epochs=2)
    runner.fit(half, loader)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    states = torch.load(tmp_path / "half.ckpt", weights_only=True)["gpkit_penalties"]
    assert states == {
        "j": {"step": 8, "draws": 8, "seed": 0},
        "line": {"step": 8, "draws": 8, "seed": 0},
        "w": {"step": 8, "draws": 3, "seed": 0},
    }

    torch.manual_seed(99)
    resumed = randomly_penalised()
    trainer(max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.penalties["line"].state_dict() == whole.penalties["line"].state_dict()


def test_a_penalty_that_a_checkpoint_lacks_begins_at_its_beginning(tmp_path):
    loader, runner = DataLoader(classes(), B), trainer(max_epochs=1)
    runner.fit(randomly_penalised(), loader)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    module = randomly_penalised(new=gpkit.wgan_lp(1.0, seed=5))
    trainer(max_epochs=1).fit(module, loader, ckpt_path=tmp_path / "half.ckpt")
    assert module.penalties["new"].state_dict() == {"step": 0, "draws": 0, "seed": 5}
    assert module.penalties["line"].draws == 4


def test_a_module_is_loaded_from_a_checkpoint_with_its_net_and_loss(tmp_path):
    made, runner, path = randomly_penalised(), trainer(max_epochs=1), tmp_path / "one.ckpt"
    runner.fit(made, DataLoader(classes(), B))
    runner.save_checkpoint(path)
    penalty = {"line": gpkit.wgan_gp(1.0, of=class_sum)}
    found = gpkit.PenalizedModule.load_from_checkpoint(
        path, net=mlp(), loss=F.cross_entropy, penalty=penalty
    )
    torch.testing.assert_close(found.state_dict(), made.state_dict(), rtol=0, atol=0)
    assert found.penalties["line"].state_dict() == made.penalties["line"].state_dict()
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'net' and 'loss"):
        gpkit.PenalizedModule.load_from_checkpoint(path)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"net": lambda x: x}, TypeError, r"`net=...` must be a torch.nn.Module; got a function"),
        ({"loss": 3}, TypeError, r"`loss=...` must be a function \(output, y\) -> loss; got 3"),
        ({"penalty": "r1"}, TypeError, r"must be a penalty, or a list or dict of them; got 'r1'"),
        (
            {"penalty": gpkit.r1},
            TypeError,
            r"a list or dict of them; got the function r1: call it, r1\(\)",
        ),
        (
            {"penalty": [gpkit.r1]},
            TypeError,
            r"a list or dict of them; got the function r1: call it, r1\(\)",
        ),
        ({"penalty": {"a": 1.0}}, TypeError, r"`penalty=\{'a': ...\}` must be a penalty; got 1.0"),
        ({"metrics": {"f1": "f1"}}, TypeError, r"`metrics=...` must be torchmetrics by name"),
        ({"metrics": 3}, TypeError, r"`metrics=...` must be torchmetrics by name.*got 3"),
        ({"histogram_every_n_epochs": -1}, ValueError, r"must be an integer >= 0; got -1"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        gpkit.PenalizedModule(**{"net": mlp(), "loss": F.mse_loss, **arguments})
