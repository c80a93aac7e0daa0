"""The first step of a compiled loss is compared with the eager one, and both are timed."""

import copy
import logging

import pytest
import torch
from compiling import Graphs, critic, samples, wgan_gp
from torch import nn

import gpkit
from gpkit.compiling import parity

FASTER = parity.faster
pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("graphs_alone")]


@pytest.mark.parametrize("by", [1e-2, 1e-5])
def test_what_differs_is_not_used(by):
    """A backend with a wrong derivative, and the right value."""

    def wrong(graph, inputs):
        return lambda *args: [out + by * (out - out.detach()) for out in graph(*args)]

    net = critic()
    loss, (penalty,) = wgan_gp(net)
    step = gpkit.compile(loss, backend=wrong)
    batch, before = samples(), copy.deepcopy(net.state_dict())
    with pytest.warns(
        UserWarning,
        match=r"wgan_gp.*loss is not compiled: .* differs: its value by \S+ and "
        rf"its gradient by {by:.1e}, relative to the eager one, with \S+ allowed",
    ):
        step(*batch).backward()
    assert all(torch.equal(a, before[name]) for name, a in net.state_dict().items())
    again = copy.deepcopy(penalty)
    expected = net(batch[1]).mean() - net(batch[0]).mean()
    expected = expected + again(net, real=batch[0], fake=batch[1])
    assert step(*batch) == expected  # and no second warning


def test_rounding_may_differ_more_where_terms_cancel():
    """The graph has inputs that are rounded; the loss is a difference of nearly equal numbers."""

    def rounded(graph, inputs):
        shift = lambda a: a * (1 + 3e-7) if a.dtype == torch.float32 and a.ndim else a  # noqa: E731
        return lambda *args: graph(*map(shift, args))

    net, penalty = critic(), gpkit.r1(weight=1e-5)
    step = gpkit.compile(
        lambda x, z: 1 + (net(z) - net(x)).mean() + penalty(net, real=x), backend=rounded
    )
    x = samples()[0]
    apart = []
    difference = parity.difference
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parity, "difference", lambda *a: apart.append(difference(*a)) or apart[-1])
        step(x, x + 1e-3)
    assert max(apart[0]) > 1e-5
    assert step.obstacle is None


def test_nan_in_a_gradient_is_no_equal():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    def backend(graph, _):
        broken = lambda out: Broken.apply(out) if out.requires_grad else out  # noqa: E731
        return lambda *args: [broken(out) for out in graph(*args)]

    step = gpkit.compile(wgan_gp(critic())[0], backend=backend)
    with pytest.warns(UserWarning, match="differs: its value by .* and its gradient by inf"):
        step(*samples()).backward()


def test_the_slower_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr("gpkit.compiling.parity.faster", lambda *_: (0.001, 0.002))
    graphs = Graphs()
    step = gpkit.compile(wgan_gp(critic())[0], backend=graphs)
    with caplog.at_level(logging.INFO, logger="gpkit"):
        for _ in range(3):
            step(*samples())
    assert graphs.run == 1  # the comparison
    assert "s to compile" in caplog.text
    assert "runs eager, which is faster: 1 ms eager, 2 ms compiled" in caplog.text
    assert step.obstacle is None


def test_both_are_timed_without_a_trace(monkeypatch):
    """Three rounds of each, with backward passes; the state is that of one step."""
    times = []
    monkeypatch.setattr(parity, "faster", lambda *given: times.append(FASTER(*given)) or times[-1])
    net = critic(nn.BatchNorm1d(6), nn.Dropout(0.5)).eval()
    seen = []
    penalty = gpkit.r1(seed=3, weight=gpkit.target_norm(1.0))
    net.register_forward_hook(lambda *_: seen.append(gpkit.in_penalty()))
    step = gpkit.compile(lambda x: net(x).mean() + penalty(net, real=x), backend=Graphs())
    x, state = samples()[0], copy.deepcopy(net.state_dict())
    before = torch.get_rng_state()
    step(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(times) == 1
    assert min(times[0]) > 0
    assert seen.count(False) == 1  # all other passes say that they are no step
    assert penalty.step == penalty.draws == 1
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True)
    )
    assert all(p.grad is None for p in net.parameters())
