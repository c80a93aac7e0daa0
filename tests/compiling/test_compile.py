"""gpkit.compile: a loss with penalties inside, as one graph, equals the eager loss."""

import pytest
import torch
from compiling import Graphs, critic, needs_compiler, same, samples, wgan_gp
from torch import nn

import gpkit

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


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::Warning")  # of the compiler's own
def test_a_norm_layer_and_a_two_sided_form_by_the_compiler():
    """Forward and inner gradient traced apart gave wrong derivatives here (pytorch#175477)."""
    same(lambda: critic(nn.LayerNorm(6)), wgan_gp, [samples(), samples()], backend="inductor")


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
