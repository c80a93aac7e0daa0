"""What keeps a penalty from acting: told before the first optimiser step, all in one line."""

import pickle

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import batches, callback, fit, loader, penalty
from modules import QUIET, Plain
from nets import net
from refused import refusal, refused
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpkit
from gpkit.lightning.refusals import CALLBACK_REFUSAL, RefusalError


def test_two_callbacks():
    line = refusal(Plain(net()), callback(), callback("input"))
    assert "the trainer has 2 GradientPenaltyCallbacks" in line
    assert "GradientPenaltyCallback([a, b])" in line


def test_two_callbacks_for_one_submodule():
    """Of one key in checkpoints, in terms of which Lightning would refuse them before."""
    line = refusal(Plain(net()), callback(), callback())
    assert line.count("the trainer has 2 GradientPenaltyCallbacks") == 1


@pytest.mark.parametrize("own", [None, gpkit.none(), gpkit.weight_grad_norm()])
def test_a_module_with_penalties_of_its_own(own):
    """With none as well: it logs a total of its own."""
    line = refusal(gpkit.PenalizedModule(net(), nn.CrossEntropyLoss(), own), callback())
    assert "a PenalizedModule adds penalties itself" in line
    assert "PenalizedModule(..., penalty=...)" in line


@pytest.mark.parametrize(
    ("name", "hint"),
    [("net.backbon", "(did you mean 'net.backbone'?)"), ("nets", "(did you mean 'net'?)")],
)
def test_a_misspelled_submodule(name, hint):
    line = refused(penalty("input"), name)
    assert f"there is no submodule {name!r}" in line
    assert hint in line
    assert "there are 'net'" in line


def test_a_misspelled_activation():
    wrt = gpkit.activation("backbne")
    parts = {"one": penalty("input"), "two": gpkit.input_grad_norm(wrt=wrt)}
    line = refused(parts, "net")
    assert "activation('backbne') names no submodule (did you mean 'backbone'?)" in line


def test_a_pattern_that_matches_nothing():
    line = refused(penalty(match="net.haed.*"))
    assert "weights('net.haed.*') matches no parameter (did you mean 'net.head." in line


def test_frozen_parameters():
    module = Plain(net())
    module.net.head.requires_grad_(False)
    line = refused(penalty(match="net.head.*"), lightning_module=module)
    assert "all 2 parameters of weights('net.head.*') are frozen" in line


class Tokens(Plain):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3)).double())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x.abs().long()), y)


def test_an_input_of_integers():
    line = refused(penalty("input"), "net", Tokens())
    assert "the input of the submodule 'net' is torch.int64, which has no gradient" in line
    assert "such as the one after an embedding" in line


def test_an_activation_that_is_no_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.recurrent(x[:, None])[0][:, 0])

    made = gpkit.input_grad_norm(wrt=gpkit.activation("recurrent"))
    line = refused(made, "net", Plain(Pair().double()))
    assert "activation('recurrent') must be a floating-point tensor; got a tuple" in line


class Calls(Plain):
    """Calls its net so many times."""

    def __init__(self, times):
        super().__init__(net())
        self.other, self.times = nn.Linear(5, 3).double(), times

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.other(x) + sum(self.net(x) for _ in range(self.times)), y)


@pytest.mark.parametrize("made", [penalty("input"), gpkit.jacobian()], ids=["loss", "output"])
def test_a_submodule_that_is_not_called(made):
    line = refused(made, "net", Calls(0))
    assert "the training step does not call the submodule 'net'" in line
    assert line.endswith("name one that it calls, such as 'other'")


class ByForward(Plain):
    """Calls the method of its net, which runs no hooks."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net.forward(x), y)


def test_a_submodule_whose_forward_is_called_directly():
    line = refused(penalty("input"), "net", ByForward(net()))
    assert "does not call the submodule 'net', but runs parts of it" in line
    assert "as net.forward(x) does: write net(x), or name one that it calls, such as " in line
    name = line.rpartition("such as ")[2].partition(",")[0].strip("'")
    fit(ByForward(net()), gpkit.GradientPenaltyCallback(penalty("input"), module=name), batches(2))


def test_a_submodule_that_is_called_twice():
    line = refused(penalty("input"), "net", Calls(2))
    assert (
        "the training step calls the submodule 'net' 2 times: name one that is called once" in line
    )
    wrt = gpkit.activation("backbone")
    line = refused(gpkit.input_grad_norm(wrt=wrt), "net", Calls(2))
    assert "the training step calls activation('backbone') 2 times" in line


def test_an_activation_that_is_not_called():
    wrt = gpkit.activation("backbone")
    line = refused(gpkit.input_grad_norm(wrt=wrt), "net", Calls(0))
    assert "does not call activation('backbone'): name one that it calls" in line


def test_a_penalty_that_begins_later_is_checked_when_it_does():
    parts = {"now": penalty(), "later": penalty("input", weight=gpkit.switch(0.0, 1.0, at=1))}
    cb = gpkit.GradientPenaltyCallback(parts, "net")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[cb], logger=False, **QUIET)
    with pytest.raises(ValueError, match="calls the submodule 'net' 2 times"):
        trainer.fit(Calls(2), loader(batches()))
    assert trainer.global_step == 1


@pytest.mark.parametrize("where", ["weight", "input"])
def test_reentrant_checkpointing(where):
    class Saves(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            h = self.net.backbone(x)
            return F.cross_entropy(checkpoint(self.net.head, h, use_reentrant=True), y)

    line = refusal(Saves(net()), callback(where) if where == "weight" else on_backbone())
    assert "uses reentrant checkpointing" in line
    assert "use_reentrant=False" in line


def on_backbone():
    return gpkit.GradientPenaltyCallback(penalty("input"), "net.backbone")


class Manual(Plain):
    def __init__(self):
        super().__init__(net())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimisation_without_a_choice():
    line = refused(penalty(), lightning_module=Manual())
    assert "optimises manually: say which of the manual_backward calls" in line


def test_a_choice_of_backward_under_automatic_optimisation():
    assert "`manual_backward=...` is for manual optimisation" in refused(
        penalty(), manual_backward=0
    )


@pytest.mark.parametrize(
    "made",
    [
        penalty("weight", "difference"),
        penalty("input", "difference"),
        penalty(scope="accumulated"),
        gpkit.per_sample_grad_norm(),
    ],
    ids=["difference", "input", "accumulated", "sample"],
)
def test_what_runs_the_step_again_is_refused_under_manual_optimisation(made):
    line = refused(made, "net", lightning_module=Manual(), manual_backward=0)
    assert "would step the optimisers again under manual optimisation" in line


@pytest.mark.parametrize("at", ["fake", "interpolate"])
def test_points_that_need_fakes(at):
    line = refused(gpkit.zero_gp(at=at), "net")
    assert f"at={at}() needs fake samples, which a training step does not show" in line


def test_environments():
    line = refused(gpkit.irm(), "net")
    assert "penalty 'irm': it needs the environment of each sample" in line


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_takes_the_iterator():
    class Iterates(Plain):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    line = refused(penalty("weight", "difference"), lightning_module=Iterates(net()))
    assert "and `dataloader_iter` gives another" in line


def test_a_detached_loss():
    class Detached(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    assert "the loss of the training step has no graph: was it detached?" in refused(
        penalty(), lightning_module=Detached(net())
    )


class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
    """Is called what shards parameters."""


def test_strategies_that_shard():
    class Counts(Plain):
        steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return super().training_step(batch, batch_idx)

    module, strategy = Counts(net()), FSDPStrategy(device=torch.device("cpu"))
    line = refusal(module, callback(), strategy=strategy)
    assert module.steps == 0
    assert "FSDP1, whose flat parameters have no double backward: use ModelParallelStrategy" in line


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_all_at_once(first):
    """Of the trainer, of the names, and of the step; of both callbacks."""
    parts = {
        "fakes": gpkit.wgan_gp(),
        "named": gpkit.weight_grad_norm(match="nothing.*"),
        "tokens": penalty("input"),
        "environments": gpkit.irm(),
    }
    cb = gpkit.GradientPenaltyCallback(parts, "net", manual_backward=1)
    other = gpkit.GradientPenaltyCallback(penalty(match="typo.*"), "nte")
    line = refusal(Tokens(), *([cb, other] if first else [other, cb]))
    for part in (
        "GradientPenaltyCallback cannot add its penalties: ",
        "2 GradientPenaltyCallbacks",
        "is for manual optimisation",
        "penalty 'fakes': at=interpolate() needs fake samples",
        "penalty 'named': weights('nothing.*') matches no parameter",
        "penalty 'environments': it needs the environment",
        "there is no submodule 'nte' (did you mean 'net'?)",
        "the input of the submodule 'net' is torch.int64",
    ):
        assert line.count(part) == 1


def test_of_names_and_of_the_step_at_once():
    parts = {"named": gpkit.weight_grad_norm(match="nothing.*"), "tokens": penalty("input")}
    line = refusal(Tokens(), gpkit.GradientPenaltyCallback(parts, "net"))
    assert "matches no parameter" in line
    assert "is torch.int64" in line


def test_a_refusal_goes_to_another_process():
    error = pickle.loads(pickle.dumps(RefusalError(CALLBACK_REFUSAL, ["one", "two"])))
    assert str(error) == "GradientPenaltyCallback cannot add its penalties: one; two"
    assert error.found == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": 3},), "must be a penalty; got 3"),
        ((penalty(), 3), "must be the name of a submodule, such as 'backbone'; got 3"),
    ],
    ids=["penalty", "module"],
)
def test_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        gpkit.GradientPenaltyCallback(*arguments)


def test_a_negative_backward():
    with pytest.raises(ValueError, match=r"`manual_backward=...` must be an integer >= 0"):
        gpkit.GradientPenaltyCallback(penalty(), manual_backward=-1)
