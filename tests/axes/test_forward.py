"""The axis `forward`: how a penalty runs the net itself."""

import copy
import functools

import pytest
import pytorch_lightning as pl
import torch
from fits import fit
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import gpkit


def critic():
    torch.manual_seed(0)
    return nn.Sequential(
        spectral_norm(nn.Conv2d(2, 4, 3)),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(16, 1)),
    )


def images(n=5):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(2))


def between(real, fake):
    """Return interpolates, drawn from torch's global stream as published code does."""
    alpha = torch.rand(len(real), 1, 1, 1, dtype=real.dtype)
    return alpha * real + (1 - alpha) * fake


def by_hand(net, real, fake):
    """WGAN-GP as published: a training forward pass at the interpolates."""
    x = between(real, fake).requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return 10 * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()


def trained(net, penalty):
    """Return all numbers of the net after three steps of a critic."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    real = images().to(next(net.parameters()))
    fake = real.flip(0) * 2 + 1
    for _ in range(3):
        loss = net(fake).mean() - net(real).mean() + penalty(net, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*net.parameters(), *net.buffers(), torch.get_rng_state(), net(real)]


def test_training_moves_what_the_published_loop_moves_bit_for_bit():
    """Live dropout, batch norm, both kinds of spectral norm, and the global stream."""
    penalty = gpkit.wgan_gp(weight=10.0, at=between, forward="training")
    real, fake, mine, theirs = images(), images().flip(0) * 2 + 1, critic(), critic()
    stream = torch.get_rng_state()
    found = [penalty(mine, real=real, fake=fake).item() for _ in range(3)]
    drawn = torch.get_rng_state()
    torch.set_rng_state(stream)
    true = [by_hand(theirs, real, fake).item() for _ in range(3)]
    assert found == pytest.approx(true, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), theirs.buffers(), strict=True))


def test_training_trains_as_the_published_loop():
    penalty = gpkit.wgan_gp(weight=10.0, at=between, forward="training")
    found = trained(critic().double(), lambda net, x, y: penalty(net, real=x, fake=y))
    true = trained(critic().double(), by_hand)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_look_at_the_terms_leaves_no_trace():
    penalty, net = gpkit.r1(forward="training"), critic()
    before, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    looked = penalty.terms(net, real=images()).penalty
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert penalty(net, real=images()).item() == looked.item()
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("inside", [False, True], ids=["the net", "a function that calls it"])
def test_eval_is_the_slope_of_the_net_in_eval_mode(inside):
    net = critic().double()
    net[1].eval()  # a mode of its own, which stays
    modes, before = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    x, nets = images().double(), [net]
    found = gpkit.r1(weight=2.0, forward="eval")((lambda z: nets[0](z)) if inside else net, real=x)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    grads = torch.autograd.grad(found, list(net.parameters()), allow_unused=True)
    plain = critic().double().eval()
    plain.load_state_dict(before)

    def true(params):
        def score(z):
            return torch.func.functional_call(plain, params, (z[None],)).sum()

        return torch.func.vmap(torch.func.grad(score))(x).flatten(1).square().sum(1).mean()

    true_grads, value = torch.func.grad_and_value(true)(dict(plain.named_parameters()))
    torch.testing.assert_close(found, value)
    for grad, own in zip(grads, true_grads.values(), strict=True):
        torch.testing.assert_close(torch.zeros_like(own) if grad is None else grad, own)


def test_eval_ends_after_an_error():
    net = critic()

    def broken(x):
        net(x)
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        gpkit.r1(forward="eval")(broken, real=images())
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("forward", ["training", "eval"])
@pytest.mark.parametrize("kind", ["inputs", "weights", "a difference in the weights"])
def test_a_tensor_has_no_forward_pass_of_the_penalty(kind, forward):
    net, x = critic(), images().requires_grad_()
    advice = "give the penalty the function"
    if kind == "inputs":
        with pytest.raises(ValueError, match=advice):
            gpkit.r1(forward=forward)(net(x), x)
        gpkit.r1(forward=forward)(net, x)
        return
    estimator = "exact" if kind == "weights" else "finite_difference"
    penalty = gpkit.weight_grad_norm(forward=forward, estimator=estimator)
    with pytest.raises(ValueError, match=advice):
        penalty.with_loss(lambda: net(x).mean(), net)
    with pytest.raises(ValueError, match=advice):
        penalty(net(x).mean(), net)
    penalty(lambda: net(x).mean(), net)


def test_one_of_three_words():
    with pytest.raises(ValueError, match=r"forward=.*training"):
        gpkit.r1(forward="train")
    with pytest.raises(ValueError, match="scope='batch'"):
        gpkit.weight_grad_norm(scope="global", forward="eval")
    assert "forward='eval'" in repr(gpkit.cure(forward="eval"))
    assert gpkit.cure(forward="eval").axes()["forward"] == "eval"


class Step(pl.LightningModule):
    """Trains on the mean square of the net's output."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.seen = {}

    def training_step(self, x, index):
        return self.net(x).square().mean()

    def on_train_batch_end(self, *_):
        self.seen = {k: v.double() for k, v in self.trainer.callback_metrics.items()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sizes(output, y):
    return output.flatten().square()


PENALTIES = {
    "inputs": gpkit.input_grad_norm,
    "curvature": functools.partial(gpkit.cure, h=0.5),
    "weights": gpkit.weight_grad_norm,
    "a difference in the weights": functools.partial(
        gpkit.weight_grad_norm, estimator="finite_difference"
    ),
}


@pytest.mark.parametrize("kind", PENALTIES)
def test_eval_in_the_callback_and_in_a_module(kind):
    """The loss is that of training mode, the penalty that of the net in eval mode."""
    x = images().double()
    plain = critic().double()
    torch.manual_seed(3)
    plain_loss = sizes(plain(x), None).mean()  # moves the statistics, as training does
    plain.eval()
    own, penalty = PENALTIES[kind](weight=0.3), PENALTIES[kind](weight=0.3, forward="eval")
    if own.wrt.batched:
        value = own(lambda z: sizes(plain(z), None), x)
    else:
        value = own(lambda: sizes(plain(x), None).mean(), plain)

    loss = nn.MSELoss(reduction="mean")
    module = gpkit.PenalizedModule(critic().double(), loss=loss, penalty=penalty)
    torch.manual_seed(3)
    total = module.penalized_loss((x, torch.zeros(5, 1).double()))
    torch.manual_seed(3)
    torch.testing.assert_close(total, plain_loss + value)
    if kind != "curvature":  # it needs the loss of each sample, which the callback does not have
        options = {"module": "net"} if own.wrt.batched else {}
        callback = gpkit.GradientPenaltyCallback(PENALTIES[kind](0.3, forward="eval"), **options)
        module = fit(Step(critic().double()), callback, [x], max_steps=1)
        torch.testing.assert_close(module.seen[f"penalty/{own.name}"], value.detach())
