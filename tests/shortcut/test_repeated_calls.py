"""A call that repeats an earlier one takes the shortcut, and is as right as the first."""

import copy
import gc
import weakref

import pytest
import torch
from plain_critics import Images, by_hand, critic, require_right, samples
from torch import nn

import gpkit

FORMS = {
    "r1": (gpkit.r1, lambda n2: n2 / 2),
    "wgan_gp": (gpkit.wgan_gp, lambda n2: (n2.sqrt() - 1) ** 2),
    "wgan_lp": (gpkit.wgan_lp, lambda n2: (n2.sqrt() - 1).relu() ** 2),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("images", [False, True])
def test_repeated_calls_are_those_of_a_loop(name, images, no_long_way):
    preset, value = FORMS[name]
    net, shape = (Images().double(), (3, 7, 7)) if images else (critic(), (5,))
    penalty = preset(weight=2.0, at="real")
    require_right(penalty, net, samples(4, *shape), value, 2.0)
    no_long_way()
    for size in (4, 3, 1):
        require_right(penalty, net, samples(size, *shape), value, 2.0)
    net.load_state_dict({k: v + 0.1 for k, v in net.state_dict().items()})  # as a step does
    require_right(penalty, net, samples(4, *shape), value, 2.0)


def test_a_norm_of_zero_has_a_finite_gradient_in_a_repeated_call(no_long_way):
    net, penalty = critic(), gpkit.wgan_gp(weight=1.0, at="real")
    penalty(net, real=samples(4, 5))
    no_long_way()
    with torch.no_grad():
        net[2].weight.zero_()
    found = penalty(net, real=samples(4, 5))
    assert found.item() == 1
    grads = torch.autograd.grad(found, list(net.parameters()), allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)


def test_a_forward_pass_leaves_no_trace_in_a_repeated_call(no_long_way):
    net, penalty = Images().double(), gpkit.r1()
    penalty(net, real=samples(4, 3, 7, 7))
    no_long_way()
    before = torch.get_rng_state()
    penalty(net, real=samples(4, 3, 7, 7))
    assert net.note == "new"
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in net.parameters())


def test_points_and_dropout_draw_the_same_with_and_without_the_shortcut():
    net = nn.Sequential(nn.Linear(5, 64), nn.Dropout(), nn.Linear(64, 1))
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    short, long = gpkit.wgan_gp(seed=3), gpkit.wgan_gp(seed=3)
    for _ in range(4):
        found = short(net, real=x, fake=y)
        long.shortcuts.found.clear()
        assert torch.equal(found, long(net, real=x, fake=y))
    assert short.shortcuts.found


def frozen(net):
    net[0].weight.requires_grad_(False)


def replaced(net):
    net[0] = nn.Linear(5, 8).double()


def tanh(net):
    net[1] = nn.Tanh()


def added(net):
    net.append(nn.Linear(1, 1).double())


def tied(net):
    net[2].weight = nn.Parameter(net[2].weight.detach() * 2)


@pytest.mark.parametrize("change", [frozen, replaced, tanh, added, tied])
def test_a_change_of_the_net_is_seen(change):
    net, penalty = critic(), gpkit.r1(weight=2.0)
    for _ in range(3):
        require_right(penalty, net, samples(4, 5), FORMS["r1"][1], 2.0)
    change(net)
    for _ in range(3):
        require_right(penalty, net, samples(4, 5), FORMS["r1"][1], 2.0)


def test_another_mode_is_seen():
    net, penalty = critic(), gpkit.r1(weight=2.0)
    net.insert(2, nn.Dropout(0.9))
    net.eval()
    for _ in range(3):
        require_right(penalty, net, samples(4, 5), FORMS["r1"][1], 2.0)
    net.train()
    found = [penalty(net, real=samples(4, 5)).item() for _ in range(3)]
    assert len(set(found)) == 3  # each has masks of its own
    net.eval()
    require_right(penalty, net, samples(4, 5), FORMS["r1"][1], 2.0)


def test_a_net_that_comes_to_have_buffers_is_isolated():
    net, penalty = critic(), gpkit.r1()
    for _ in range(3):
        penalty(net, real=samples(4, 5))
    net.insert(1, nn.BatchNorm1d(8).double())
    with pytest.warns(UserWarning, match="depend on each other"):
        penalty(net, real=samples(4, 5))
    for _ in range(3):
        penalty(net, real=samples(4, 5))
    assert not net[1].running_mean.any()
    assert net[1].num_batches_tracked == 0


def test_a_net_that_becomes_linear_is_refused():
    net, penalty = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1)), gpkit.r1()
    x = torch.randn(4, 5)
    for _ in range(3):
        penalty(net, real=x)
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        penalty(net, real=x)


class Deep(nn.Module):
    """A net with as many steps as the samples say."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x):
        for _ in range(len(x)):
            x = torch.tanh(self.step(x))
        return self.head(x)


def test_a_net_that_makes_another_graph_takes_the_long_way():
    net, penalty = Deep().double(), gpkit.r1(weight=2.0)
    for size in (2, 2, 3, 3, 4, 4, 2, 2):
        x = samples(size, 5)
        x_hand = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(x_hand).sum(), x_hand, create_graph=True)
        torch.testing.assert_close(penalty(net, real=x), g.square().sum(1).mean())


def attends_at_times(h):
    """Return attention for some samples, and else as many nodes in the graph."""
    h = h[:, None, None].expand(-1, 1, 3, -1) * torch.arange(1.0, 4)[:, None]
    if h.detach().mean() > 0:
        h = nn.functional.scaled_dot_product_attention(h, h, h)
    else:
        h = torch.tanh(h)
    return h.sum((1, 2))


class AttendsAtTimes(nn.Sequential):
    def forward(self, x):
        return self[1](attends_at_times(self[0](x)))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_net_that_comes_to_attend_has_a_double_backward(hooked):
    layers, penalty = [nn.Linear(5, 4), nn.Linear(4, 1)], gpkit.r1(weight=2.0)
    net = (nn.Sequential if hooked else AttendsAtTimes)(*layers).double()
    if hooked:
        net[0].register_forward_hook(lambda module, args, out: attends_at_times(out))
    nn.init.constant_(net[0].weight, 0.3)
    for sign in (-1, -1, 1, 1, -1):
        x = sign * (samples(4, 5).abs() + 1)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            expected, grads = by_hand(net, x, FORMS["r1"][1], 2.0)
        found = penalty(net, real=x)
        torch.testing.assert_close(found, expected)
        own = torch.autograd.grad(found, [*net.parameters()], allow_unused=True)
        torch.testing.assert_close(own, grads)


def test_a_change_of_an_axis_is_seen(no_long_way):
    net, penalty = critic(), gpkit.r1(weight=2.0)
    penalty(net, real=samples(4, 5))
    penalty.form = gpkit.two_sided(1.0)
    require_right(penalty, net, samples(4, 5), FORMS["wgan_gp"][1], 2.0)
    penalty.order = 2
    no_long_way()
    with pytest.raises(AssertionError, match="long way"):
        penalty(net, real=samples(4, 5))


def test_arguments_of_another_kind_take_the_long_way():
    net, penalty = critic(), gpkit.r1()
    for _ in range(3):
        penalty(net, samples(4, 5))
    with pytest.raises(TypeError, match="needs samples"):
        penalty(net)
    with pytest.raises(TypeError, match="floating-point"):
        penalty(net, real=torch.ones(4, 5, dtype=torch.int64))
    with torch.no_grad():
        assert not penalty(net, real=samples(4, 5)).requires_grad
    half = penalty(net, real=samples(4, 5), sample_weight=torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(half, gpkit.r1()(net, real=samples(4, 5)[:1]))


OUTSIDE = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(5, 8).requires_grad_()


class Frozen(nn.Module):
    """A net whose own parameters are frozen; it trains one that it does not own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 1).double().requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(x @ OUTSIDE))


def test_a_parameter_that_the_net_does_not_own_is_found_frozen(no_long_way):
    net, penalty = Frozen(), gpkit.r1()
    for _ in range(3):
        penalty(net, real=samples(4, 5))
    OUTSIDE.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        penalty(net, real=samples(4, 5))
    OUTSIDE.requires_grad_()
    no_long_way()
    assert penalty(net, real=samples(4, 5)).requires_grad


def test_a_penalty_keeps_no_net_alive_and_its_copies_know_none():
    net, penalty = critic(), gpkit.r1()
    for _ in range(3):
        penalty(net, real=samples(4, 5))
    assert penalty.shortcuts.found
    assert not copy.deepcopy(penalty).shortcuts.found
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert not penalty.shortcuts.found
