"""From the start of a fit to its end, however it ends, and on from a checkpoint."""

import copy
import pickle
from functools import partial, wraps

import by_hand
import pytest
import pytorch_lightning as pl
import torch
from fits import (
    LAMBDA,
    assert_trained_as,
    batches,
    callback,
    fit,
    loader,
    one_rank,
    penalty,
    train_pooled,
)
from modules import QUIET, SGD, Plain
from nets import net
from pytorch_lightning.callbacks import ModelCheckpoint

import gpkit


class Trips(pl.Callback):
    """Raise at a batch, until told not to."""

    def __init__(self, error, at=2):
        self.error, self.at = error, at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.at and self.error is not None:
            raise self.error


class Falls(Plain):
    error = None

    def training_step(self, batch, batch_idx):
        if self.error is not None and batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


def started(cb, *others):
    return pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, callbacks=[cb, *others], logger=False, **QUIET
    )


def interrupted(where, error):
    """Return a callback and a module of a fit that was interrupted."""
    module, cb, trips = Falls(net()), callback(), Trips(error if where == "callback" else None)
    module.error = error if where == "training_step" else None
    end = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(end):
        started(cb, trips).fit(module, loader(batches()))
    module.error = None
    return cb, module


@pytest.mark.parametrize("where", ["training_step", "callback"])
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=repr)
def test_interrupted_and_fitted_again(where, error):
    cb, module = interrupted(where, error)
    assert "training_step" not in module.__dict__
    assert not module.net._forward_pre_hooks
    again = Plain(net())
    again.load_state_dict(module.state_dict())
    true = by_hand.train(
        again.net, one_rank(batches()), by_hand.weight_exact, LAMBDA, SGD, windows=[1] * 6
    )
    started(cb).fit(module, loader(batches()))
    assert_trained_as(module.net, true)


def test_a_training_step_of_the_instance_is_given_back():
    module = Plain(net())
    calls = []

    def own(batch, batch_idx):
        calls.append(batch_idx)
        return Plain.training_step(module, batch, batch_idx)

    module.training_step = own
    started(callback()).fit(module, loader(batches()))
    assert module.__dict__["training_step"] is own
    assert calls == list(range(6))


def is_left_alone(net, x):
    """Whether a net computes with what it is given, and not with a copy or a leaf of it."""
    given = []
    hook = net.backbone.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    net(x)
    hook.remove()
    return given[0] is x


class Validates(Plain):
    """Validates in every epoch, and keeps copies of itself from the middle of a step."""

    copies = ()

    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and not self.copies:
            self.copies = [copy.deepcopy(self), pickle.loads(pickle.dumps(self))]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        assert is_left_alone(self.net, batch[0])

    def val_dataloader(self):
        return loader(batches(1))


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("given", ["class", "instance"])
def test_outside_of_a_training_step_of_the_fit_all_is_as_it_was(given):
    module, (x, y) = Validates(net()), batches()[0]
    if given == "instance":
        module.training_step = partial(Validates.training_step, module)
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "logger": False, **QUIET}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[callback("input")], **options)
    trainer.fit(module, loader(batches()))
    assert not module.net._forward_pre_hooks
    for one in (module, *module.copies):
        assert is_left_alone(one.net, x)
    for copied in module.copies:
        assert copied.net is not module.net
        loss = Plain.training_step(copied, (x, y), 0)
        assert torch.equal(copied.training_step((x, y), 0), loss)


def test_two_fits_one_after_the_other_are_penalised_once_each():
    cb, module = callback(), Plain(net())
    for _ in range(2):
        started(cb).fit(module, loader(batches()))
    true = net()
    for _ in range(2):
        true = by_hand.train(
            true, one_rank(batches()), by_hand.weight_exact, LAMBDA, SGD, windows=[1] * 6
        )
    assert_trained_as(module.net, true)


def decorated(step):
    @wraps(step)
    def outer(*args, **kwargs):
        return step(*args, **kwargs)

    return outer


class Short(Plain):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Decorated(Plain):
    @decorated
    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize("kind", [Short, Decorated])
def test_lightning_reads_the_signature_of_the_step(kind):
    """It asks for a batch_idx or not; a decorator of the user's is looked through."""
    made = fit(kind(net()), callback(), batches())
    true = by_hand.train(
        net(), one_rank(batches()), by_hand.weight_exact, LAMBDA, SGD, windows=[1] * 6
    )
    assert_trained_as(made, true)


class Skips(Plain):
    """Gives no loss for every third batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)


nothing = pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")


@nothing
def test_a_step_that_returns_nothing_is_skipped():
    class OneByOne(Skips):  # a step without a gradient moves nothing, and has no momentum
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2)

    micro = one_rank([b for i, b in enumerate(batches()) if i % 3 != 2])
    sgd = partial(torch.optim.SGD, lr=0.2)
    true = by_hand.train(net(), micro, by_hand.weight_exact, LAMBDA, sgd, windows=[1] * 4)
    assert_trained_as(fit(OneByOne(net()), callback(), batches()), true)


@nothing
def test_micro_batches_without_the_last_are_not_kept_for_the_next_step():
    """Of (0, 1, nothing) and (3, 4, nothing) no penalty is taken; each step is a plain one."""
    cb = callback(scope="accumulated")
    made = fit(Skips(net()), cb, batches() + batches(1), accumulate_grad_batches=3)
    first, second = ([b, c] for b, c in (batches()[:2], batches()[3:5]))
    true = train_pooled(net(), [(first, 3), (second, 3), (batches(1), 3)], step_weight)
    assert_trained_as(made, true)


def step_weight(step):
    return LAMBDA if step == 2 else 0.0


def stateful():
    """Penalties with all the state that there is."""
    average = gpkit.two_sided(gpkit.running_average(0.8))
    return {
        "drawn": gpkit.jacobian(
            gpkit.warmup(LAMBDA, steps=9), form=average, seed=3, of=lambda outputs: outputs
        ),
        "lazy": gpkit.weight_grad_norm(LAMBDA, every=3, scope="accumulated"),
        "steered": gpkit.weight_grad_norm(gpkit.target_norm(0.3, weight=LAMBDA)),
    }


def resumable(folder, epochs, ckpt_path=None, **options):
    adam = partial(torch.optim.Adam, lr=0.01)
    cb = gpkit.GradientPenaltyCallback(stateful(), "net")
    saved = ModelCheckpoint(folder, "last", enable_version_counter=False)
    options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, **options}
    made = fit(
        Plain(net(), optimizer=adam),
        [cb, saved],
        batches(),
        epochs=epochs,
        ckpt_path=ckpt_path,
        **options,
    )
    return made, cb


@pytest.mark.filterwarnings("ignore:.*random estimate of n²")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, kept = resumable(tmp_path / "whole", 4)
    resumable(tmp_path / "half", 2)
    resumed, others = resumable(tmp_path / "half", 4, tmp_path / "half" / "last.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert others.state_dict() == kept.state_dict()
    forgetful, _ = resumable(tmp_path / "other", 2)
    assert not torch.equal(forgetful.net.head.weight, whole.net.head.weight)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_of_other_penalties_is_taken_for_those_that_it_has(tmp_path):
    """One was left out since, and one is new: it begins at its beginning."""
    kept, dropped, new = penalty(), gpkit.jacobian(LAMBDA), gpkit.jacobian(LAMBDA, seed=5)
    saved = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    options = {"enable_checkpointing": True}
    cb = gpkit.GradientPenaltyCallback({"kept": kept, "dropped": dropped}, "net")
    fit(Plain(net()), [cb, saved], batches(), **options)
    cb = gpkit.GradientPenaltyCallback({"kept": penalty(), "new": new}, "net")
    options["ckpt_path"] = tmp_path / "last.ckpt"
    fit(Plain(net()), [cb, saved], batches(), epochs=2, **options)
    assert {name: p.step for name, p in cb.penalties.items()} == {"kept": 12, "new": 12}
    assert (new.draws, new.seed) == (6, 5)  # of its own epoch


@pytest.mark.filterwarnings("ignore:.*random estimate of n²")
def test_a_checkpoint_holds_plain_types(tmp_path):
    resumable(tmp_path, 1)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (mine,) = (v for k, v in state.items() if k.startswith("GradientPenaltyCallback"))
    assert set(mine["penalties"]) == {"drawn", "lazy", "steered"}
    assert mine["penalties"]["lazy"]["step"] == 3
    plain = pickle.dumps(mine)
    assert b"gpkit" not in plain
    assert b"torch" not in plain


def test_the_key_of_the_state_does_not_hold_the_weight():
    """Else a run could not go on with another one."""
    keys = set()
    for cb in (gpkit.GradientPenaltyCallback(penalty(weight=w)) for w in (0.1, 0.2)):
        started(cb).fit(Plain(net()), loader(batches(1)))
        keys.add(cb.state_key)
    assert keys == {"GradientPenaltyCallback{'module': None}"}


def test_a_callback_goes_to_another_process():
    cb, _ = interrupted("callback", ZeroDivisionError("mine"))
    copied = pickle.loads(pickle.dumps(cb))
    assert copied.state_dict() == cb.state_dict()
    assert copied.state_dict()["penalties"]["weight_grad_norm"]["step"] == 3
    module = Plain(net())
    started(copied).fit(module, loader(batches()))
    true = by_hand.train(
        net(), one_rank(batches()), by_hand.weight_exact, LAMBDA, SGD, windows=[1] * 6
    )
    assert_trained_as(module.net, true)
