"""Steps of the callback that repeat an earlier one are right, and take no long way."""

import by_hand
import pytest
import torch
import torch.nn.functional as F
from fits import LAMBDA, assert_trained_as, batches, callback, difference, fit, one_rank
from modules import SGD, Plain
from torch import nn

import gpkit


def net():
    torch.manual_seed(0)
    layers = nn.Linear(5, 90), nn.Tanh(), nn.Linear(90, 80), nn.SiLU(), nn.Linear(80, 3)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_a_fit_is_the_loop_by_hand(estimator, accumulate, looks):
    windows = [accumulate] * (6 // accumulate)
    total = by_hand.TOTALS["weight", estimator]
    true = by_hand.train(net(), one_rank(batches()), total, LAMBDA, SGD, windows=windows)
    added = callback("weight", estimator)
    assert_trained_as(fit(Plain(net()), added, batches(), accumulate_grad_batches=accumulate), true)
    assert len(looks) == (2 if estimator == "exact" else 1)


class Stateful(nn.Module):
    """It counts its calls, moves a buffer, draws numbers, and takes another way now and then."""

    def __init__(self):
        super().__init__()
        self.calls, self.inner = 0, net()
        self.other = nn.Linear(5, 3).double()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x):
        self.calls += 1
        part = self.other if self.calls in (4, 5) else self.inner
        return self.norm(F.dropout(part(x), 0.3, self.training))


class Watched(Plain):
    """It keeps what each step has returned."""

    def __init__(self, net):
        super().__init__(net)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss.detach())
        return {"loss": loss, "kept": batch_idx}


def test_a_rerun_leaves_no_trace_and_another_graph_takes_the_long_way(looks):
    torch.manual_seed(1)
    made = fit(Watched(Stateful()), callback("weight", "difference"), batches(8))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    net = Stateful()
    optimizer = SGD(net.parameters())
    for step, (x, y) in enumerate(batches(8)):
        start, before = torch.get_rng_state(), {n: b.clone() for n, b in net.named_buffers()}
        loss = F.cross_entropy(net(x), y)
        assert made.losses[step] == pytest.approx(loss.item(), abs=1e-9)
        every = list(net.parameters())
        here = torch.autograd.grad(loss, every, allow_unused=True)
        params = [p for p, g in zip(every, here, strict=True) if g is not None]  # of this way
        here = [g for g in here if g is not None]
        optimizer.zero_grad()
        length = by_hand.squares(here).sqrt()
        moved, now = torch.get_rng_state(), {n: b.clone() for n, b in net.named_buffers()}
        values = [p.detach().clone() for p in params]
        torch.set_rng_state(start)
        net.load_state_dict(before, strict=False)
        net.calls -= 1
        with torch.no_grad():
            for p, g in zip(params, here, strict=True):
                p += by_hand.STEP * g / length
        there = torch.autograd.grad(F.cross_entropy(net(x), y), params)
        torch.set_rng_state(moved)
        net.load_state_dict(now, strict=False)
        with torch.no_grad():
            for p, value, a, b in zip(params, values, here, there, strict=True):
                p.copy_(value)
                p.grad = a + LAMBDA * 2 * length * (b - a) / by_hand.STEP
        optimizer.step()
    assert difference(made.net, net) < 1e-9
    assert made.net.calls == net.calls == 8
    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(made.net.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(looks) < 8


def test_a_rescaled_weight_divides_the_total(looks):
    penalty = gpkit.weight_grad_norm(
        gpkit.rescaled(4.0), estimator=gpkit.finite_difference(by_hand.STEP)
    )
    made = fit(Plain(net()), gpkit.GradientPenaltyCallback(penalty), batches())

    def total(net, x, y, weight, scale):
        return by_hand.weight_difference(net, x, y, 4.0, scale) / 4.0

    assert_trained_as(
        made, by_hand.train(net(), one_rank(batches()), total, 1.0, SGD, windows=[1] * 6)
    )
    assert len(looks) == 1
