"""with_loss: the loss and a finite difference of it, for two passes in all."""

import copy
from functools import partial

import pytest
import torch
from compare import gradients, relative_error
from differenced import data, fd, mlp
from torch import nn

import gpkit


def counted(net, x):
    """Return a closure, and the lists of its forwards and backwards."""
    forwards, backwards = [], []

    def closure():
        forwards.append(1)
        loss = net(x).square().mean()
        loss.register_hook(backwards.append)
        return loss

    return closure, forwards, backwards


@pytest.mark.parametrize(
    "build",
    [
        partial(gpkit.weight_grad_norm, weight=0.3, estimator=fd(0.1)),
        partial(gpkit.weight_grad_norm, weight=0.3, estimator=fd(0.1, "backward"), match="2.*"),
        partial(gpkit.weight_grad_norm, form=gpkit.two_sided(0.4), estimator=fd(0.1)),
        gpkit.gnp,
    ],
)
def test_with_loss_is_the_sum_for_two_passes(build):
    net, x = mlp(), data()
    closure, forwards, backwards = counted(net, x)
    build().with_loss(closure, net)  # a new net is run once more: does it repeat?
    forwards.clear(), backwards.clear()
    total = build().with_loss(closure, net)
    found = gradients(total, net)
    assert len(forwards) == len(backwards) == 2
    apart = net(x).square().mean() + build()(closure, net)
    torch.testing.assert_close(total, apart)
    torch.testing.assert_close(found, gradients(apart, net), rtol=1e-12, atol=1e-12)


def test_with_loss_leaves_the_traces_of_one_forward():
    # batch statistics and random numbers as a plain step; the other point has the same mask
    net, x = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5)), data()
    plain = copy.deepcopy(net)
    state = torch.get_rng_state()
    loss = plain(x).square().mean()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    penalty = gpkit.weight_grad_norm(weight=0.3, estimator=fd(1e-5, "central"))
    total = penalty.with_loss(lambda: net(x).square().mean(), net)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))
    exact = loss + gpkit.weight_grad_norm(weight=0.3)(loss, plain)
    torch.testing.assert_close(total, exact)
    assert relative_error(gradients(total, net), gradients(exact, plain)) < 1e-6


def test_with_loss_of_other_estimators_scopes_and_modes():
    net, x = mlp(), data()
    losses = partial(lambda: net(x).square().squeeze(1))
    loss = losses().mean()
    exact = gpkit.weight_grad_norm(weight=0.3)
    both = exact.with_loss(lambda: losses().mean(), net), loss + exact(loss, net)
    torch.testing.assert_close(*[gradients(b, net) for b in both])
    lazy = gpkit.gnp(every=2)
    steps = [lazy.with_loss(lambda: losses().mean(), net) for _ in range(2)]
    torch.testing.assert_close(steps[1], loss)
    torch.testing.assert_close(gradients(steps[1], net), gradients(losses().mean(), net))
    sample = gpkit.weight_grad_norm(scope="sample", estimator=fd(0.1))
    torch.testing.assert_close(
        gradients(sample.with_loss(losses, net), net),
        gradients(losses().mean() + sample(losses, net), net),
    )
    with torch.no_grad():
        value = gpkit.gnp().with_loss(lambda: losses().mean(), net)
    torch.testing.assert_close(value, gpkit.gnp().with_loss(lambda: losses().mean(), net).detach())
    assert not value.requires_grad


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_gnp_is_sam(alpha):
    net, x = mlp(), data()
    params = list(net.parameters())
    first = torch.autograd.grad(net(x).square().mean(), params)
    norm = torch.cat([g.flatten() for g in first]).norm()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p, g in zip(twin.parameters(), first, strict=True):
            p += 0.05 * g / norm
    second = gradients(twin(x).square().mean(), twin)
    sam = (1 - alpha) * torch.cat([g.flatten() for g in first]) + alpha * second
    together = gpkit.gnp(alpha=alpha).with_loss(lambda: net(x).square().mean(), net)
    apart = net(x).square().mean() + gpkit.gnp(alpha=alpha)(lambda: net(x).square().mean(), net)
    for total in (together, apart):
        assert relative_error(gradients(total, net), sam) < 1e-10
        assert relative_error(total, net(x).square().mean() + alpha * 0.05 * norm) < 1e-12


@pytest.mark.parametrize("name", ["weight_grad_norm", "input_grad_norm", "gnp", "cure"])
def test_in_a_lightning_module(name):
    net, x, y = mlp(), data(), torch.zeros(5, 1).double()
    axes = {} if name in ("gnp", "cure") else {"estimator": fd(1e-5, "central")}
    penalty = getattr(gpkit, name)(weight=0.7, **axes)
    module = gpkit.PenalizedModule(net, loss=nn.MSELoss(), penalty=penalty)
    found = gradients(module.penalized_loss((x, y)), net)
    loss = net(x).square().mean()
    args = (
        (lambda x: net(x).square().squeeze(1), x)
        if name in ("input_grad_norm", "cure")
        else (lambda: net(x).square().mean(), net)
    )
    again = getattr(gpkit, name)(weight=0.7, **axes)(*args)
    assert relative_error(found, gradients(loss + again, net)) < 1e-10
    with pytest.warns(UserWarning, match=r"no effect: '\w+' takes differences, by \w+_difference"):
        gpkit.PenalizedModule(net, loss=nn.MSELoss(), penalty=penalty, compile=True)


def test_a_module_takes_two_forwards_and_two_backwards_a_step():
    # catches a training forward that the penalty does not make use of, another dropout mask, and
    # batch statistics that move twice
    torch.manual_seed(0)
    net = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5))
    by_hand, x, y = copy.deepcopy(net), data(), torch.randn(5, 1, dtype=torch.float64)
    penalty = gpkit.weight_grad_norm(weight=0.3, estimator=fd(1e-4))
    module = gpkit.PenalizedModule(net, nn.MSELoss(), copy.deepcopy(penalty))
    forwards, backwards = [], []
    net[0].register_forward_hook(lambda *_: forwards.append(1))
    net[-1].register_full_backward_hook(lambda *_: backwards.append(1))
    module.penalized_loss((x, y))  # a new net is run once more: does it repeat?
    net.load_state_dict(by_hand.state_dict())
    forwards.clear()
    backwards.clear()

    torch.manual_seed(1)
    total = module.penalized_loss((x, y))
    after = torch.get_rng_state()
    total.backward()
    assert (len(forwards), len(backwards)) == (2, 2)

    torch.manual_seed(1)
    expected = penalty.with_loss(lambda: nn.functional.mse_loss(by_hand(x), y), by_hand)
    expected.backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(total, expected)
    for found, wanted in zip(net.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)
    torch.testing.assert_close(net.state_dict(), by_hand.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_what_of_selects_from_the_closures_result_is_selected_once(estimator):
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    of = {"of": lambda out: 2 * out["loss"], "estimator": estimator}
    penalty = gpkit.weight_grad_norm(weight=0.1, **of)
    total = penalty.with_loss(lambda: {"loss": (w**2).sum() / 4}, [w])
    assert total.item() == pytest.approx(25 / 2 + 0.1 * 25)
    (grad,) = torch.autograd.grad(total, w)
    torch.testing.assert_close(grad, 1.2 * w.detach(), rtol=1e-6, atol=0)
    scaled = gpkit.weight_grad_norm(weight=0.1, estimator=estimator, of=lambda out: 2 * out)
    assert scaled.with_loss(lambda: (w**2).sum() / 4, [w]).item() == pytest.approx(total.item())


def test_with_loss_refuses_what_is_no_loss():
    net = nn.Linear(5, 3)
    x = torch.randn(4, 5)
    for of in ("sampled_loss", gpkit.activation("0")):
        penalty = gpkit.GradientPenalty(wrt="weight", of=of)
        with pytest.raises(ValueError, match=r"of=.*: add the penalty to the loss"):
            penalty.with_loss(lambda: net(x), net)
    with pytest.raises(ValueError, match=r"losses \[B\].*got \[4, 3\].*loss \+ penalty"):
        gpkit.GradientPenalty(wrt="weight").with_loss(lambda: net(x), net)
