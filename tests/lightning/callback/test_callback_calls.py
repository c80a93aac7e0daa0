"""A submodule that a step calls several times: which call is meant, against loops by hand."""

import copy

import by_hand
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import LAMBDA, assert_trained_as, batches, fit, loader
from loggers import Record
from modules import QUIET, SGD, Plain
from refused import refusal
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpkit


def two_layers(outputs):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


class OneBackward(pl.LightningModule):
    """A critic's step as most are written: real, then fakes, then one backward."""

    def __init__(self, automatic=False):
        super().__init__()
        self.automatic_optimization = automatic
        self.discriminator = two_layers(1)

    def configure_optimizers(self):
        return SGD(self.discriminator.parameters())

    def loss(self, x):
        fake = x.flip(0)[:4] * 2 + 1
        return F.softplus(-self.discriminator(x)).mean() + (
            F.softplus(self.discriminator(fake)).mean()
        )

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch[0])
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def trained_by_hand(module, call, slope="output"):
    """R1 on the real samples (call 0) or on the fakes (call 1), or λ mean ‖B ∂L/∂x_i‖²."""
    critic = copy.deepcopy(module.discriminator)
    optimizer = SGD(critic.parameters())
    for x, _ in batches():
        points = [x.clone().requires_grad_(), (x.flip(0)[:4] * 2 + 1).requires_grad_()]
        scores = [critic(z) for z in points]
        loss = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
        z = points[call]
        y = scores[call].sum() if slope == "output" else loss * len(z)
        (slopes,) = torch.autograd.grad(y, z, create_graph=True)
        optimizer.zero_grad()
        (loss + LAMBDA * slopes.square().sum(1).mean()).backward()
        optimizer.step()
    return critic


@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize(
    ("made", "slope"),
    [
        (gpkit.r1(2 * LAMBDA, at="data"), "output"),
        (gpkit.input_grad_norm(LAMBDA), "loss"),
    ],
    ids=["r1", "loss"],
)
def test_the_chosen_call_is_penalised(made, slope, call, automatic):
    """The fakes are fewer than the real samples: B is that of the chosen call."""
    which = None if automatic else 0
    module, made = OneBackward(automatic), copy.deepcopy(made)
    cb = gpkit.GradientPenaltyCallback(made, "discriminator", manual_backward=which, call=call)
    trained = fit(module, cb, batches())
    assert_trained_as(trained.discriminator, trained_by_hand(module, call, slope))


@pytest.mark.parametrize("call", [0, 1])
def test_what_runs_the_step_again_moves_the_chosen_call(call):
    """By finite differences, within their error; the other call is 50 % and more away."""
    made = gpkit.input_grad_norm(LAMBDA, estimator=gpkit.finite_difference(1e-4))
    module = OneBackward(automatic=True)
    cb = gpkit.GradientPenaltyCallback(made, "discriminator", call=call)
    trained = fit(module, cb, batches()).discriminator
    true = trained_by_hand(module, call, "loss")
    for got, want in zip(trained.parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


def test_without_a_choice_every_call_is_listed():
    for module, which in ((OneBackward(), 0), (OneBackward(automatic=True), None)):
        cb = gpkit.GradientPenaltyCallback(
            gpkit.r1(at="data"), "discriminator", manual_backward=which
        )
        line = refusal(module, cb)
        assert "calls the submodule 'discriminator' 2 times: name one that is called once" in line
        assert "call=0 [6, 5], call=1 [4, 5]" in line


def test_a_call_that_there_is_not():
    cb = gpkit.GradientPenaltyCallback(gpkit.jacobian(), "discriminator", call=2)
    line = refusal(OneBackward(automatic=True), cb)
    assert "2 times, and call=2 is not one of these: call=0 [6, 5], call=1 [4, 5]" in line
    cb = gpkit.GradientPenaltyCallback(gpkit.jacobian(), "net", call=1)
    line = refusal(Plain(two_layers(3)), cb)
    assert "calls the submodule 'net' once, and call=1 is not one of these: call=0 [6, 5]" in line


class Shared(nn.Module):
    """A block that is used twice in one call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.block, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.block(torch.tanh(self.block(x)))))


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_a_shared_block_in_a_net_that_is_called_once(call, estimator):
    net = Shared().double()
    estimator = gpkit.finite_difference(1e-4) if estimator != "exact" else estimator
    made = gpkit.input_grad_norm(LAMBDA, wrt=gpkit.activation("block"), estimator=estimator)
    cb = gpkit.GradientPenaltyCallback(made, "net", call=call)
    trained = fit(Plain(net), cb, batches())
    optimizer = SGD(net.parameters())
    for x, y in batches():
        first = net.block(x)
        second = net.block(torch.tanh(first))
        loss = F.cross_entropy(net.head(torch.tanh(second)), y)
        h = (first, second)[call]
        (slopes,) = torch.autograd.grad(len(x) * loss, h, create_graph=True)
        optimizer.zero_grad()
        (loss + LAMBDA * slopes.square().sum(1).mean()).backward()
        optimizer.step()
    close = 1e-12 if estimator == "exact" else 2e-4
    for got, want in zip(trained.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=close)


def test_the_output_of_the_chosen_call_in_the_weights():
    """Without an input to capture the calls were not counted, and the last was taken."""
    module = OneBackward(automatic=True)
    made = gpkit.GradientPenalty(of="output", wrt="weight", weight=LAMBDA)
    assert "2 times" in refusal(module, gpkit.GradientPenaltyCallback(made, "discriminator"))
    cb = gpkit.GradientPenaltyCallback(copy.deepcopy(made), "discriminator", call=0)
    trained = fit(module, cb, batches(2)).discriminator
    critic = copy.deepcopy(module.discriminator)
    optimizer = SGD(critic.parameters())
    for x, _ in batches(2):
        score = critic(x)
        loss = F.softplus(-score).mean() + F.softplus(critic(x.flip(0)[:4] * 2 + 1)).mean()
        grads = torch.autograd.grad(score.mean(), list(critic.parameters()), create_graph=True)
        optimizer.zero_grad()
        (loss + LAMBDA * by_hand.squares(grads)).backward()
        optimizer.step()
    assert_trained_as(trained, critic)


def test_a_net_that_a_later_step_calls_more_often():
    """The first step shows one call; the second has two, of which the last was taken."""

    class Later(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + self.net(batch[0]).mean() if batch_idx else loss

    cb = gpkit.GradientPenaltyCallback(gpkit.jacobian(), "net")
    with pytest.raises(ValueError, match="calls the submodule 'net' 2 times"):
        fit(Later(two_layers(3)), cb, batches())


def test_calls_under_checkpointing():
    """A rerun in the backward pass does not know which call it is of."""

    class Saves(OneBackward):
        def loss(self, x):
            real, fake = (
                checkpoint(self.discriminator, z, use_reentrant=False)
                for z in (x, x.flip(0)[:4] * 2 + 1)
            )
            return F.softplus(-real).mean() + F.softplus(fake).mean()

    for call in (0, 1):
        module = Saves(automatic=True)
        made = gpkit.r1(2 * LAMBDA, at="data")
        cb = gpkit.GradientPenaltyCallback(made, "discriminator", call=call)
        trained = fit(module, cb, batches())
        assert_trained_as(trained.discriminator, trained_by_hand(module, call))


def test_other_arguments_of_the_chosen_call():
    """The net is called again at moved points, with the arguments that the step gave it."""

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(5, 3)

        def forward(self, x, scale, *, shift):
            return torch.tanh(self.inside(x) * scale + shift)

    class Twice(Plain):
        def loss(self, batch):
            x, y = batch
            for scale in (1.0, 2.0):
                z = self.net(x, x[:, :1] * scale, shift=x[:, 1:2])
            return F.cross_entropy(z, y)

    torch.manual_seed(0)
    module = Twice(Conditional().double())
    made = gpkit.GradientPenalty(
        at=gpkit.uniform(0.0, 0.0), weight=LAMBDA, of=lambda z: z.sum(1)
    )  # at zero
    trained = fit(module, gpkit.GradientPenaltyCallback(made, "net", call=1), batches(2))
    net = copy.deepcopy(module.net)
    optimizer = SGD(net.parameters())
    for x, y in batches(2):
        scale, shift = x[:, :1] * 2, x[:, 1:2]
        loss = F.cross_entropy(net(x, scale, shift=shift), y)
        z = torch.zeros_like(x).requires_grad_()
        (slope,) = torch.autograd.grad(net(z, scale, shift=shift).sum(), z, create_graph=True)
        optimizer.zero_grad()
        (loss + LAMBDA * slope.square().sum(1).mean()).backward()
        optimizer.step()
    assert_trained_as(trained.net, net)


def test_submodules_that_can_be_named_are_listed():
    """Only those that the step calls with floating-point tensors, and not the one refused."""

    class Deep(Plain):
        def __init__(self):
            super().__init__(nn.Linear(5, 3).double())
            self.unused = nn.Linear(5, 3).double()
            self.embed = nn.Embedding(3, 3).double()
            self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.embed(y) + self.body(x)[:, :3], y)

    cb = gpkit.GradientPenaltyCallback(gpkit.jacobian(), "unused")
    line = refusal(Deep(), cb)
    assert line.endswith("name one that it calls, such as 'body', 'body.0', 'body.1'")
    wrt = gpkit.activation("unused")
    line = refusal(Deep(), gpkit.GradientPenaltyCallback(gpkit.input_grad_norm(wrt=wrt)))
    assert line.endswith("such as 'embed', 'body', 'body.0', 'body.1'")
    monitor = gpkit.GradientNormMonitor(inputs="unused")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[monitor], logger=False, **QUIET
    )
    with pytest.raises(ValueError, match=r"it calls, such as 'body', 'body\.0'"):
        trainer.fit(Deep(), loader(batches()))


@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
def test_the_monitor_has_the_same_choice(automatic):
    """Under manual optimisation it took the last call, on fakes."""
    module, record = OneBackward(automatic), Record()
    which = None if automatic else 0
    refused = gpkit.GradientNormMonitor(None, inputs="discriminator", manual_backward=which)
    with pytest.raises(ValueError, match=r"2 times: name one .* call=0 \[6, 5\], call=1 \[4, 5\]"):
        fit(module, refused, batches(1))
    monitor = gpkit.GradientNormMonitor(None, inputs="discriminator", manual_backward=which, call=0)
    fit(module, monitor, batches(1), logger=record)
    x = batches(1)[0][0].requires_grad_()
    score = module.discriminator(x)
    (slopes,) = torch.autograd.grad(F.softplus(-score).sum(), x)
    (row,) = record.rows
    assert row["grad_norm/input"] == pytest.approx(slopes.norm(dim=1).mean().item(), rel=1e-6)


def test_one_call_for_each_backward_needs_no_choice():
    """The second backward's only call is meant, not the first one of the step."""

    class TwoBackwards(OneBackward):
        def training_step(self, batch, batch_idx):
            x, optimizer = batch[0], self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.softplus(-self.discriminator(x)).mean())
            self.manual_backward(F.softplus(self.discriminator(x.flip(0)[:4] * 2 + 1)).mean())
            optimizer.step()

    module = TwoBackwards()
    made = gpkit.r1(2 * LAMBDA, at="data")
    cb = gpkit.GradientPenaltyCallback(made, "discriminator", manual_backward=1)
    trained = fit(module, cb, batches())
    assert_trained_as(trained.discriminator, trained_by_hand(module, 1))
