"""gpkit.compile: a loss with penalties inside, as one graph, equals the eager loss."""

import copy
import logging
import warnings

import pytest
import torch
from compiling import Graphs, critic, needs_compiler, same, samples
from torch import nn

import gpkit
from gpkit.compiling import obstacles, parity

FASTER = parity.faster
pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("graphs_alone")]


@pytest.mark.filterwarnings("ignore:the outputs of a batch depend")
def test_a_critic_step_by_step():
    """Interpolates drawn anew, batch norm, two penalties, one of them lazy, a smaller batch."""

    def make_loss(net):
        gp = gpkit.wgan_gp(gpkit.warmup(10.0, steps=3), seed=1)
        lazy = gpkit.weight_grad_norm(weight=0.3, every=2, match="*.weight", seed=2)

        def loss(real, fake):
            value = net(fake).mean() - net(real).mean()
            return value + gp(net, real=real, fake=fake) + lazy(value, net)

        return loss, (gp, lazy)

    real, fake = torch.randn(8, 4), torch.randn(8, 4)
    batches = [(real, fake), (fake, real), (real, fake), (real[:5], fake[:5])]
    step = same(lambda: critic(nn.BatchNorm1d(6)), make_loss, batches)
    assert step.terms[0].weight == 10.0  # of the schedule at its end
    assert step.terms[1] is None  # it did not act


def wgan_gp(net):
    penalty = gpkit.wgan_gp(gpkit.warmup(10.0, steps=3), seed=1)

    def loss(real, fake):
        return net(fake).mean() - net(real).mean() + penalty(net, real=real, fake=fake)

    return loss, (penalty,)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::Warning")  # of the compiler's own
def test_a_norm_layer_and_a_two_sided_form_by_the_compiler():
    """Forward and inner gradient traced apart gave wrong derivatives here (pytorch#175477)."""
    same(lambda: critic(nn.LayerNorm(6)), wgan_gp, [samples(), samples()], backend="inductor")


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


def everything(net):
    """Averages, environments, weights of samples, and ways to run a net, in one loss."""
    average = gpkit.two_sided(gpkit.running_average(0.9, use="graph"))
    path = gpkit.r1(form=average, seed=1)  # with dropout masks of its own
    fishr = gpkit.fishr(ema=0.9, weight=0.5)
    weighed = gpkit.input_grad_norm(gpkit.target_norm(0.5), seed=2)
    quiet = gpkit.r1(forward="eval", seed=3)

    def loss(x, env):
        logits, a = gpkit.features(net, x)
        y, rows = (x[:, 0] > 0).float(), torch.arange(len(x))
        total = logits.mean() + fishr((logits, a), y, env) + path(net, real=x)
        total = total + weighed(net, x, sample_weight=x[:, 1].abs())
        return total + quiet(net, real=x, groups=rows)

    return loss, (path, fishr, weighed, quiet)


def test_what_learns_looks_up_and_draws():
    """A last batch lacks an environment: it runs as it is, and the next is compiled again."""
    env = torch.arange(8) % 2
    envs = [env, env.flip(0), 0 * env, env]
    batches = [(samples()[0], own) for own in envs]
    build = lambda: critic(nn.BatchNorm1d(6), nn.Dropout(0.5))  # noqa: E731
    graphs = Graphs()
    step = same(build, everything, batches, backend=graphs)
    assert (graphs.compiled, graphs.run) == (1, 4)  # one of them at first, and one was run again
    assert [own.weight for own in step.terms[:2]] == [0.5, 10.0]


def test_taylor_mode_has_the_derivatives_of_nested_gradients():
    """Along v = 1, with a layer norm, and a factor from the batch."""
    net = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        net[0].bias += torch.arange(4.0)  # else the norm's variance is that of the weights alone
    penalty = gpkit.GradientPenalty(order=2, estimator=gpkit.taylor(), weight=0.5)

    def loss(x, c):
        return net(x).mean() + penalty(lambda z: net(z) * c + c, x)

    step = gpkit.compile(loss, measure=False)
    for n in (5, 5):
        x = torch.randn(n, 1, dtype=torch.float64)
        c = torch.randn(n, 1, dtype=torch.float64)
        z = x.clone().requires_grad_()
        with gpkit.elementary():
            d = net(z) * c
        for _ in range(2):
            (d,) = torch.autograd.grad(d.sum(), z, create_graph=True)
        expected = net(x).mean() + 0.5 * d.square().mean()
        found = step(x, c)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(t, [*net.parameters()]) for t in (found, expected)]
        torch.testing.assert_close(*grads)
    assert step.obstacle is None


def test_norms_of_samples_are_those_of_a_loop():
    net, penalty, x = critic().double(), gpkit.per_sample_grad_norm(0.5), samples(5)[0].double()
    step = gpkit.compile(
        lambda x: penalty.with_loss(lambda: net(x)[:, 0].square(), net), measure=False
    )
    params = [*net.parameters()]
    for _ in range(2):
        losses = net(x)[:, 0].square()
        grads = [torch.autograd.grad(own, params, create_graph=True) for own in losses]
        n2 = torch.stack([sum(g.square().sum() for g in own) for own in grads])
        expected, found = losses.mean() + 0.5 * n2.mean(), step(x)
        torch.testing.assert_close(found, expected)
        own = [torch.autograd.grad(total, params) for total in (found, expected)]
        torch.testing.assert_close(*own)
    assert step.obstacle is None


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.rnn(x.unsqueeze(1))[0][:, -1])


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def variable_inside(net, penalty):
    def loss(x, _):
        x = x.detach().requires_grad_()
        return net(x).mean() + penalty(net(x), x)

    return loss


OBSTACLES = {
    "recurrent": (Recurrent, gpkit.r1, None, "does not trace recurrent nets, as nn.LSTM"),
    "noise": (
        lambda: critic(Noise()),
        gpkit.r1,
        None,
        "forward pass of a penalty draws random numbers that are not those of F.dropout",
    ),
    "twice": (
        critic,
        lambda: gpkit.r1(form=gpkit.two_sided(gpkit.running_average(0.9))),
        lambda net, penalty: lambda x, _: penalty(net, real=x) + penalty(net, real=-x),
        "'r1' is called twice in a step, and the second call reads the average that the first",
    ),
    "adaptive, twice": (
        critic,
        lambda: gpkit.r1(gpkit.target_norm(1.0)),
        lambda net, penalty: lambda x, _: penalty(net, real=x) + penalty(net, real=-x),
        "'r1' is called twice in a step, and the second call reads the weight that the first",
    ),
    "variable": (
        critic,
        gpkit.input_grad_norm,
        variable_inside,
        r"requires_grad_\(\).*: give the penalty the function, penal",
    ),
    "differences": (
        critic,
        lambda: gpkit.r1(estimator="finite_difference"),
        None,
        "'r1' takes differences, by finite_difference.*torch.compile the net alone",
    ),
    "step": (
        critic,
        gpkit.r1,
        lambda net, penalty: lambda x, _: net(x).mean() + penalty(net, real=x, step=3),
        "'r1' is called with step=: leave it out",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning:gpkit.findings.trained")
@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_compiled_runs_as_it_is(name):
    build, make, make_loss, said = OBSTACLES[name]
    net, penalty = build(), make()
    other = copy.deepcopy(penalty)
    losses = [
        make_loss(net, p) if make_loss else lambda x, _, p=p: net(x).mean() + p(net, real=x)
        for p in (penalty, other)
    ]
    step = gpkit.compile(losses[0], backend=Graphs())
    x = samples()[0]
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match=said):
        found = [step(x, None)]
    found.append(step(x, None))
    torch.manual_seed(4)
    assert found == [losses[1](x, None) for _ in range(2)]


def test_refusals():
    with pytest.raises(TypeError, match=r"takes the function that returns the loss; got a Tensor"):
        gpkit.compile(torch.ones(1))
    assert repr(gpkit.compile(len)) == "gpkit.compile(<built-in function len>)"


def normalised():
    return critic(nn.BatchNorm1d(6))


def other(net, *layers):
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
    "another net": (lambda: other(normalised(), nn.BatchNorm1d(6)), by_index, (0, 1, 1)),
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
        patch.setattr(type(step), "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(x, i)
    assert penalty.state_dict() == before
