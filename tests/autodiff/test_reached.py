"""What a function reaches is known from its runs before, until something changes."""

import functools
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.autodiff import graph
from gpkit.autodiff.reached import reach
from gpkit.estimators.base import Target

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(layers or [nn.Tanh()]), nn.Linear(8, 1)).double()


@pytest.fixture
def walks(monkeypatch):
    """The graphs that have been walked."""
    found, nodes = [], graph.nodes
    monkeypatch.setattr(graph, "nodes", lambda y: found.append(y) or nodes(y))
    return found


def frozen(net):
    net[0].weight.requires_grad_(False)


def replaced(net):
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())


def appended(net):
    net.append(nn.Tanh())


def exchanged(net):
    net[1] = nn.Softplus()


def evaluated(net):
    net.eval()


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda z: net(z)])
@pytest.mark.parametrize("change", [frozen, replaced, appended, exchanged, evaluated])
def test_a_graph_is_walked_again_where_something_has_changed(walks, wrap, change):
    net, penalty = mlp(), gpkit.r1()
    for _ in range(3):
        penalty(wrap(net), real=X)
    walks.clear()
    penalty(wrap(net), real=X)
    assert not walks
    change(net)
    penalty(wrap(net), real=X)
    assert walks
    walks.clear()
    penalty(wrap(net), real=X)
    assert not walks


def test_another_graph_of_the_same_modules_is_seen():
    """A flag that no module holds: the graph has another number of nodes."""
    net, deep = mlp(), [False]

    def f(z):
        return net(net[:2](z)[:, :4]) if deep[0] else net(z)

    call = gpkit.r1()
    for deep[0] in (False, True, False, True):
        z = X.clone().requires_grad_()
        target = Target(f(z), (z,), True)
        assert (target in call.seen) is (call.step > 1)
        call(f, real=X)


def test_mish_is_known_in_a_graph_that_is_not_walked():
    net = mlp(nn.Mish())
    x = 1e4 * X  # torch's second derivative is NaN from 710 on
    penalty = gpkit.r1()
    grads = []
    for _ in range(3):
        grads.append(torch.autograd.grad(penalty(net, real=x), net[0].weight)[0])
    assert all(torch.equal(g, grads[0]) for g in grads)
    assert grads[0].isfinite().all()


class Choosing(nn.Module):
    """A net with the activation that something says."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.act, self.flag = nn.Linear(4, 8), nn.Linear(8, 1), F.silu, False

    def forward(self, z):
        rectified = self.flag or (z > 5e3).any()
        return self.last((torch.relu if rectified else self.act)(self.first(z)))


@pytest.mark.parametrize("change", ["attribute", "flag", "data"])
def test_a_net_that_comes_to_be_piecewise_linear_has_no_second_derivative(change):
    net, penalty, x = Choosing().double(), gpkit.input_grad_norm(order=2), X
    for _ in range(3):
        penalty(net, X)
    net.act = torch.relu if change == "attribute" else net.act
    net.flag, x = change == "flag", X + 1e4 if change == "data" else X
    with pytest.raises(RuntimeError, match="piecewise-linear"):
        penalty(net, x)


def test_mish_that_a_net_comes_to_have_is_mended():
    net, penalty = Choosing(), gpkit.r1()
    for _ in range(3):
        penalty(net, real=X.float())
    net.act = F.mish
    found = penalty(net, real=1000 * X.float())
    grads = torch.autograd.grad(found, list(net.parameters()), allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)


def test_a_leaf_that_no_module_holds_is_always_looked_for(walks):
    w, net, penalty = torch.ones(1, dtype=torch.float64, requires_grad=True), mlp(), gpkit.r1()
    for _ in range(3):
        walks.clear()
        penalty(lambda z: w * net(z), real=X)
        assert walks


@pytest.mark.parametrize("late", [False, True])
def test_a_module_that_a_function_does_not_refer_to(late):
    """One that is called in the first run is always found; a later one from its next call on."""
    hidden = nn.Sequential(nn.BatchNorm1d(4)).double()
    ref, net, calls = weakref.ref(hidden), mlp(), []
    assert reach(lambda z: ref()(z)).family == []

    def f(z):
        calls.append(1)
        return net(ref()(z) if len(calls) > 3 * late else z)

    penalty = gpkit.r1()
    for _ in range(10):
        penalty(f, real=X)
    assert hidden[0].num_batches_tracked == int(late)


class Holding(nn.Module):
    """A net that holds a module which it does not own, and runs it at times."""

    def __init__(self, held):
        super().__init__()
        self.body, self.held, self.on = mlp(), held, False

    def forward(self, z):
        return self.body(self.held[0](z) if self.on or z.detach().sum() > 0 else z)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda z: net(z)])
@pytest.mark.parametrize("branch", ["attribute", "data"])
def test_a_module_that_is_held_and_runs_later_keeps_its_statistics(wrap, branch):
    hidden = nn.BatchNorm1d(4).double()
    net, penalty = Holding((hidden,)), gpkit.r1()
    for _ in range(3):
        penalty(wrap(net), real=-X.abs())
    net.on = branch == "attribute"
    penalty(wrap(net), real=-X.abs() if net.on else X.abs())
    assert hidden.num_batches_tracked == 0
    assert not hidden.running_mean.any()


class Changing(nn.Module):
    """A net whose attributes say what it does."""

    def __init__(self):
        super().__init__()
        self.body, self.act, self.others = mlp(), torch.tanh, [torch.sin]

    def forward(self, z):
        z = self.act(z)
        for other in self.others:
            z = other(z)
        return self.body(z)


HIDDEN = nn.BatchNorm1d(4).double()
LATER = {
    "a function": lambda net: setattr(net, "act", lambda z: z * random.random()),
    "NumPy": lambda net: setattr(net, "act", lambda z: z * float(np.random.rand())),
    "in a list": lambda net: net.others.append(lambda z: z * random.random()),
    "a partial": lambda net: setattr(net, "act", functools.partial(lambda h, z: h(z), HIDDEN)),
    "a module": lambda net: net.others.append(HIDDEN),
    "a closure": lambda net: setattr(net, "act", lambda z: HIDDEN(z)),
    "a hook": lambda net: net.body.register_forward_pre_hook(lambda _, args: HIDDEN(args[0])),
}


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda z: net(z)])
@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
def test_what_a_module_comes_to_hold_leaves_no_trace(wrap, change):
    net, penalty = Changing(), gpkit.r1()
    for _ in range(3):
        penalty(wrap(net), real=X)
    change(net)
    before = random.getstate(), str(np.random.get_state())
    for _ in range(3):
        penalty(wrap(net), real=X)
    assert (random.getstate(), str(np.random.get_state())) == before
    assert HIDDEN.num_batches_tracked == 0


def counted(module, _):
    module.calls += 1


def test_a_state_that_a_module_gets_later_is_kept_from_the_penalty():
    net, penalty = mlp(), gpkit.r1()
    for _ in range(3):
        penalty(net, real=X)
    net[1].register_buffer("calls", torch.zeros(()))
    net[1].register_forward_pre_hook(counted)
    penalty(net, real=X)
    assert net[1].calls == 0


def test_dropout_that_is_put_in_training_mode_later_draws_no_global_numbers():
    net = mlp(nn.Tanh(), nn.Dropout(0.5)).eval()
    penalty = gpkit.r1()
    for _ in range(3):
        penalty(net, real=X)
    net.train()
    before = torch.get_rng_state()
    a, b = penalty(net, real=X), penalty(net, real=X)
    assert a != b
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_and_modules_that_are_gone_are_forgotten():
    from gpkit.autodiff import reached

    def once():
        net = mlp()
        penalty = gpkit.r1()
        penalty(net, real=X)
        penalty(lambda z: F.silu(net(z)), real=X)

    def known():
        once()
        gc.collect()
        return len(reached._KNOWN)

    count = known()
    assert [known() for _ in range(3)] == [count] * 3
