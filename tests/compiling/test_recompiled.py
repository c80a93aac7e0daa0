"""One graph serves all steps; where something else has changed, there is another one."""

import warnings
from functools import partial

import pytest
import torch
from compiling import Graphs, critic, same, samples, wgan_gp
from torch import nn

import gpkit
from gpkit.compiling import obstacles
from gpkit.compiling.plans import Plan

pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("graphs_alone")]


def test_one_graph_for_all_weights_steps_seeds_and_values():
    graphs = Graphs()
    batches = [samples() for _ in range(5)]
    step = same(critic, wgan_gp, batches, backend=graphs)
    assert (graphs.compiled, graphs.run) == (1, 5)  # one of them the comparison in the first step
    assert step.terms[0].weight == 10.0


def test_one_more_graph_for_smaller_batches():
    graphs = Graphs()
    batches = [samples(n) for n in (8, 8, 5, 5, 8, 5, 8)]

    def make_loss(net):  # with a plain weight: a penalty knows a shortcut of its second call
        penalty = gpkit.wgan_gp(10.0, seed=1)
        return lambda real, fake: net(fake).mean() + penalty(net, real=real, fake=fake), (penalty,)

    same(critic, make_loss, batches, backend=graphs)
    assert (graphs.compiled, graphs.run) == (2, 7)  # each size is compared at first


def normalised():
    return critic(nn.BatchNorm1d(6))


def beside(net, *layers):
    """The first of two nets in a list, and another one beside it."""
    return nn.ModuleList([net, critic(*layers)])


def by_index(nets):
    gp = gpkit.wgan_gp(seed=1)
    return lambda x, z, i: nets[i](z).mean() + gp(nets[i], real=x, fake=z), (gp,)


def by_mode(net):
    gp = gpkit.wgan_gp(seed=1)

    def loss(x, z, train):
        net.train(train)
        return net(z).mean() + gp(net, real=x, fake=z)

    return loss, (gp,)


def by_flag(net):
    a, b = gpkit.r1(seed=1), gpkit.wgan_gp(gpkit.warmup(2.0, steps=3), seed=2)

    def loss(x, z, which):
        value = net(z).mean()
        if which == "none":
            return value
        return value + (a(net, real=x) if which == "r1" else b(net, real=x, fake=z))

    return loss, (a, b)


CHANGED = {
    "another net": (lambda: beside(normalised(), nn.BatchNorm1d(6)), by_index, (0, 1, 1)),
    "masks after none": (lambda: critic(nn.Dropout(0.5)), by_mode, (False, True, True)),
    "another penalty": (critic, by_flag, ("r1", "gp", "none", "gp")),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_between_steps_is_seen(name):
    """A graph knows buffers, masks and penalties of the eager step: with others it runs anew."""
    build, make_loss, given = CHANGED[name]
    same(build, make_loss, [(*samples(), own) for own in given], backend=Graphs())


def test_a_net_that_is_frozen_later_is_refused_as_without_compiling():
    net, head = critic(), nn.Linear(1, 1)
    penalty = gpkit.r1(seed=1)
    step = gpkit.compile(
        lambda x: head(net(x)).mean() + penalty(net, real=x), measure=False, backend=Graphs()
    )
    x = samples()[0]
    for _ in range(2):
        step(x)
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="all parameters of the net are frozen"):
        step(x)


def test_what_changes_at_each_step_is_given_up(monkeypatch):
    monkeypatch.setattr("gpkit.compiling.loss.KNOCKS", 2)
    net, penalty, steps = critic(), gpkit.r1(seed=1), {"now": "0"}

    def loss(x):
        weight = len(steps["now"]) * net(x).mean()
        return weight + penalty(net, real=x) if steps["now"] != "no" else weight

    step = gpkit.compile(loss, measure=False, backend=Graphs())
    x = samples()[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for now in ("0", "no", "1", "no", "222"):
            steps["now"] = now
            assert step(x) == loss(x)
    assert [str(warning.message).partition(": ")[2] for warning in said] == [
        f"{step} is not compiled: {obstacles.CHANGES}"
    ]


def test_an_error_of_the_loss_is_raised_and_an_interrupt_leaves_no_trace():
    net, penalty, table = critic(nn.BatchNorm1d(6)), gpkit.wgan_gp(seed=1), nn.Embedding(3, 4)

    def loss(x, i):
        return net(x + table(i)).mean() + penalty(net, real=x, fake=table(i))

    step = gpkit.compile(loss, measure=False, backend=Graphs())
    x, i = samples(8)[0], torch.zeros(8, dtype=torch.int64)
    for _ in range(2):
        step(x, i)
    with pytest.raises(IndexError):
        step(x, i + 3)
    step(x, i)
    assert step.obstacle is None  # the graph was not at fault

    def interrupted(*_):
        raise KeyboardInterrupt

    before = penalty.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(x, i)
    assert penalty.state_dict() == before


def in_weights(penalty, net, x):
    return penalty.with_loss(lambda: net(x).square().mean(), net)


def test_a_penalty_that_runs_elsewhere_meanwhile_needs_no_other_graph():
    """What it learns there about faster steps is not for a graph."""
    graphs, net, penalty, other = Graphs(), critic(), gpkit.weight_grad_norm(0.3), critic()
    step = gpkit.compile(partial(in_weights, penalty, net), measure=False, backend=graphs)
    for _ in range(3):
        x = samples()[0]
        torch.testing.assert_close(step(x), in_weights(gpkit.weight_grad_norm(0.3), net, x))
        for _ in range(2):
            in_weights(penalty, other, x)
    assert graphs.compiled == 1


def test_an_attribute_of_a_penalty_is_looked_at_in_each_step():
    graphs, net, penalty = Graphs(), critic(), gpkit.r1(form=gpkit.two_sided(1.0))
    step = gpkit.compile(lambda x: penalty(net, real=x), measure=False, backend=graphs)
    x = samples()[0]
    for target in (1.0, 1.0, 3.0, 3.0):
        penalty.form = gpkit.two_sided(target)
        assert step(x) == gpkit.r1(form=gpkit.two_sided(target))(net, real=x)
    assert graphs.compiled == 2


class Scaled(nn.Module):
    """A net that multiplies by the defaults of its own method."""

    def __init__(self):
        super().__init__()
        self.net = critic()

    def forward(self, x, scale=1.0, others=()):
        for other in others:
            scale = scale * other
        return scale * self.net(x)


def test_defaults_and_globals_of_code_of_the_users_own(monkeypatch):
    net, names = Scaled(), {"factor": 1.0}
    exec("def times(y): return y * factor", names)  # as in code that no module holds
    graphs, penalty, own = Graphs(), gpkit.r1(), []
    monkeypatch.setattr(Scaled.forward, "__defaults__", (1.0, own))

    def loss(x):
        return penalty(lambda z: names["times"](net(z)), real=x)

    step = gpkit.compile(loss, measure=False, backend=graphs)
    x = samples()[0]
    for change in (None, None, lambda: own.append(2.0), lambda: names.update(factor=3.0)):
        if change:
            change()
        assert step(x) == loss(x)
    monkeypatch.setattr(Scaled.forward, "__defaults__", (2.0, own))
    assert step(x) == loss(x)
    assert graphs.compiled == 4


def test_a_hook_on_a_layer_that_comes_later_is_called():
    net, penalty, graphs = critic(), gpkit.r1(), Graphs()

    def loss(x):
        return net(x).mean() + penalty(net, real=x)

    step, x, hook = gpkit.compile(loss, measure=False, backend=graphs), samples()[0], None
    for doubled in (False, True, True, False):
        if doubled and hook is None:
            hook = net[0].register_forward_hook(lambda m, i, z: 2 * z)
        if hook is not None and not doubled:
            hook.remove()
        assert step(x) == loss(x)
    assert graphs.compiled == 2


@torch.compiler.config.patch(recompile_limit=2)
def test_more_graphs_than_torch_allows_by_itself():
    """Beyond torch's own limit a change is still found, and a graph is still added."""
    graphs, net, penalty, now = Graphs(), critic(), gpkit.r1(), {"sign": "+"}

    def loss(x):
        return len(now["sign"]) * net(x).mean() + penalty(net, real=x)

    step = gpkit.compile(loss, measure=False, backend=graphs)
    x = samples()[0]
    for sign in ("+", "++", "+++", "-+-+", "-+-+", "+", "++"):
        now["sign"] = sign
        assert step(x) == loss(x)
    assert graphs.compiled == 4
    assert step.obstacle is None
