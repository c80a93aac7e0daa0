"""The callback under manual optimisation: a GAN with two optimisers, against loops by hand."""

import copy
import weakref

import by_hand
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import LAMBDA, assert_trained_as, batches, fit, loader, penalty
from loggers import Record
from modules import QUIET, SGD
from torch import nn

import gpkit


def nets():
    torch.manual_seed(3)
    critic = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    generator = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
    return critic.double(), generator.double()


class GAN(pl.LightningModule):
    """A critic's step and a generator's. The noise is the batch, in reverse."""

    def __init__(self, *, toggle=False, accumulate=1):
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.generator = nets()
        self.toggle, self.accumulate = toggle, accumulate

    def configure_optimizers(self):
        return SGD(self.critic.parameters()), SGD(self.generator.parameters())

    def losses(self, x):
        """Of the critic; then of the generator, computed when it is asked for."""
        yield F.softplus(-self.critic(x)).mean() + F.softplus(self.critic(self.fake(x))).mean()
        yield F.softplus(-self.critic(self.generator(x.flip(0)))).mean()

    def fake(self, x):
        return self.generator(x.flip(0)).detach()

    def training_step(self, batch, batch_idx):
        last = (batch_idx + 1) % self.accumulate == 0
        losses = self.losses(batch[0])
        for optimizer in self.optimizers():
            if self.toggle:
                self.toggle_optimizer(optimizer)
            self.manual_backward(next(losses) / self.accumulate)
            if last:
                optimizer.step()
                optimizer.zero_grad()
            if self.toggle:
                self.untoggle_optimizer(optimizer)


def by_hand_gan(gan, which, name, micro):
    """The loop: the chosen backward's loss L / A has λ‖∇(L / A)‖² added to it."""
    gan = copy.deepcopy(gan)
    optimizers = SGD(gan.critic.parameters()), SGD(gan.generator.parameters())
    for i, (x, _) in enumerate(micro):
        losses = gan.losses(x)
        for j, optimizer in enumerate(optimizers):
            loss = next(losses) / gan.accumulate
            if j == which:
                params = list(gan.get_submodule(name).parameters())
                if gan.toggle:  # the others are frozen
                    params = [p for p in params if any(p is q for q in mine(optimizer))]
                grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
                loss = loss + LAMBDA * by_hand.squares([g for g in grads if g is not None])
            loss.backward(inputs=mine(optimizer) if gan.toggle else None)
            if (i + 1) % gan.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return gan


def mine(optimizer):
    return optimizer.param_groups[0]["params"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("toggle", [False, True], ids=["", "toggled"])
@pytest.mark.parametrize(("which", "name"), [(0, "critic"), (1, "generator")])
def test_the_chosen_backward_is_penalised(which, name, toggle, accumulate):
    gan = GAN(toggle=toggle, accumulate=accumulate)
    cb = gpkit.GradientPenaltyCallback(penalty(), name, manual_backward=which)
    true = by_hand_gan(gan, which, name, batches())
    assert_trained_as(fit(gan, cb, batches()), true)


@pytest.mark.parametrize("toggle", [False, True], ids=["", "toggled"])
def test_all_weights_of_the_module_that_are_trained(toggle):
    gan = GAN(toggle=toggle)
    cb = gpkit.GradientPenaltyCallback(penalty(), manual_backward=1)
    assert_trained_as(fit(gan, cb, batches()), by_hand_gan(gan, 1, "", batches()))


class OneCall(pl.LightningModule):
    """A net called once, with an optimiser of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic, _ = nets()

    def configure_optimizers(self):
        return SGD(self.critic.parameters())

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.softplus(-self.critic(batch[0])).mean())
        optimizer.step()


def test_an_input_penalty():
    cb = gpkit.GradientPenaltyCallback(gpkit.r1(LAMBDA, at="data"), "critic", manual_backward=0)
    module = OneCall()
    critic = copy.deepcopy(module.critic)
    optimizer = SGD(critic.parameters())
    for x, _ in batches():
        x = x.clone().requires_grad_()
        score = critic(x)
        (slopes,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        loss = F.softplus(-score).mean() + LAMBDA / 2 * slopes.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_trained_as(fit(module, cb, batches()).critic, critic)


def test_a_step_is_let_go_of_when_it_ends():
    """What the critic gave, and the batch, are not kept for the next step."""
    gone = []

    class Looks(OneCall):
        def training_step(self, batch, batch_idx):
            hook = self.critic.register_forward_hook(self.look)
            super().training_step(batch, batch_idx)
            hook.remove()

        def look(self, module, args, output):
            self.given = weakref.ref(output)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            gone.append(self.given() is None)

    cb = gpkit.GradientPenaltyCallback(gpkit.r1(LAMBDA, at="data"), "critic", manual_backward=0)
    fit(Looks(), cb, batches(2))
    assert gone == [True, True]


def test_the_penalty_of_the_chosen_backward_is_logged():
    record, critic, rows = Record(), nets()[0], []
    optimizer = SGD(critic.parameters())
    for x, _ in batches():
        loss = F.softplus(-critic(x)).mean()
        grads = torch.autograd.grad(loss, list(critic.parameters()), create_graph=True)
        value = LAMBDA * by_hand.squares(grads)
        rows.append(
            {
                "train/loss_total": (loss + value).item(),
                "penalty/weight_grad_norm": value.item(),
                "penalty/weight_grad_norm/weight": LAMBDA,
                "penalty/weight_grad_norm/norm": by_hand.squares(grads).sqrt().item(),
            }
        )
        optimizer.zero_grad()
        (loss + value).backward()
        optimizer.step()
    cb = gpkit.GradientPenaltyCallback(penalty(), "critic", manual_backward=0)
    fit(OneCall(), cb, batches(), logger=record)
    assert record.rows == [pytest.approx(row, rel=1e-6) for row in rows]


def test_schedules_count_training_steps_and_the_module_gets_its_methods_back():
    made = penalty(every=3)
    cb = gpkit.GradientPenaltyCallback(made, "critic", manual_backward=0)
    module = fit(GAN(), cb, batches())
    assert made.step == len(batches())
    assert not {"training_step", "manual_backward"} & set(module.__dict__)


def test_a_refusal_comes_before_any_step_of_any_optimiser():
    """The second backward is the chosen one: by then the critic would have been trained."""
    gan = GAN()
    before = copy.deepcopy(gan.state_dict())
    cb = gpkit.GradientPenaltyCallback(penalty("weight", "difference"), manual_backward=1)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[cb], logger=False, **QUIET)
    with pytest.raises(ValueError, match="would step the optimisers again under manual"):
        trainer.fit(gan, loader(batches()))
    assert all(torch.equal(v, before[k]) for k, v in gan.state_dict().items())
