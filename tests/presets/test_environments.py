"""Penalties on environments: their calls, what they expect, and how a module feeds them.

Values and gradients are in the table of test_presets.py.
"""

import itertools
import json
import math

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn

import gpkit


def scene(outputs=3, samples=6, dropout=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, outputs)
    ).double()
    x = 2 * torch.randn(samples, 2, dtype=torch.float64)
    return net, x, torch.arange(samples) % max(outputs, 2), torch.tensor([2, 0, 0, 2, 0, 0])


def test_a_list_of_environments_is_the_same():
    net, x, y, env = scene()
    parts = [(x[env == e], y[env == e]) for e in (0, 2)]
    irm, fishr = gpkit.irm(weight=2.0), gpkit.fishr(weight=2.0, ema=0.0)
    flat = irm(net(x), y, env), fishr(gpkit.features(net, x), y, env)
    torch.testing.assert_close(irm([(net(a), b) for a, b in parts]), flat[0])
    torch.testing.assert_close(irm([(lambda a=a: net(a), b) for a, b in parts]), flat[0])
    torch.testing.assert_close(fishr([(gpkit.features(net, a), b) for a, b in parts]), flat[1])


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_is_the_logistic_loss(shape):
    # whose slope in w is f (σ(f) - y)
    net, x, y, env = scene(outputs=1)
    f = net(x).reshape(shape)
    slopes = (f * (f.sigmoid() - y.reshape(shape))).flatten()
    expected = sum(slopes[env == e].mean() ** 2 for e in (0, 2)) / 2
    torch.testing.assert_close(gpkit.irm(weight=1.0)(f, y, env), expected)
    torch.testing.assert_close(gpkit.irm(weight=1.0)(f, y.double().reshape(shape), env), expected)


def test_halves_have_no_bias():
    # over all pairs of samples: the product has the mean μ², the square μ² + variance / 2
    slopes = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    one = torch.zeros(2, dtype=torch.long)

    def mean(halves):
        penalty = gpkit.irm(weight=1.0, halves=halves, loss=lambda f, y: f * y)  # slope f y at 1
        pairs = itertools.product(slopes, repeat=2)
        f = torch.ones(2, dtype=torch.float64, requires_grad=True)
        return sum(penalty(f, torch.stack(pair), one) for pair in pairs).item() / 9

    assert mean(True) == pytest.approx(9)
    assert mean(False) == pytest.approx(9 + slopes.var(correction=0).item() / 2)


def test_halves_are_within_each_environment():
    net, x, y, env = scene()
    f = net(x)
    delta = f.softmax(1) - F.one_hot(y, 3)
    s = (delta * f).sum(1)
    # environment 0 has the samples 1, 2, 4, 5 and environment 2 the samples 0, 3
    expected = (s[1] + s[4]) / 2 * (s[2] + s[5]) / 2 + s[0] * s[3]
    expected = expected / 2  # environments
    torch.testing.assert_close(gpkit.irm(weight=1.0, halves=True)(f, y, env), expected)
    with pytest.raises(ValueError, match=r"two samples of every environment.*of \[5, 1\]"):
        gpkit.irm(halves=True)(f, y, torch.tensor([0, 0, 0, 0, 0, 1]))


def test_fishr_is_zero_for_equal_environments_and_for_one():
    net, x, y, _ = scene()
    logits, a = (torch.cat([t, t]) for t in gpkit.features(net, x))
    env = torch.arange(12) // 6
    penalty = gpkit.fishr(weight=1.0, ema=0.0)
    assert penalty((logits, a), torch.cat([y, y]), env) < 1e-25
    assert penalty((logits, a), torch.cat([y, y]), 0 * env) == 0
    assert penalty((logits, a), torch.cat([y, y.flip(0)]), env) > 1e-4


@pytest.mark.parametrize("preset", ["irm", "fishr"])
@pytest.mark.parametrize("given", [True, False])
def test_module_takes_environments_or_halves(preset, given):
    # catches an order of env and y, a second forward (dropout draws anew), and an ignored env
    net, x, y, env = scene(dropout=0.5)
    penalty = getattr(gpkit, preset)(weight=0.7)
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty)
    torch.manual_seed(1)
    found = module.penalized_loss((x, y, env) if given else (x, y))
    torch.manual_seed(1)
    both = gpkit.features(net, x)
    env = env if given else torch.tensor([0, 0, 0, 1, 1, 1])
    again = getattr(gpkit, preset)(weight=0.7)
    expected = F.cross_entropy(both[0], y) + again(both if preset == "fishr" else both[0], y, env)
    torch.testing.assert_close(found, expected)
    assert penalty.name == preset


def gradient(value, net):
    return torch.autograd.grad(value, [*net.parameters()], retain_graph=True)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("halves", [False, True])
def test_reduction_over_environments(reduce, halves):
    # one number, three strengths: published code has the mean, the paper the sum
    net, x, y, env = scene()
    s = ((net(x).softmax(1) - F.one_hot(y, 3)) * net(x)).sum(1)
    slopes = torch.stack([s[env == e].mean() for e in (0, 2)])
    values = slopes**2
    if halves:
        values = torch.stack([(s[1] + s[4]) / 2 * (s[2] + s[5]) / 2, s[0] * s[3]])
    true = 3.0 * getattr(values, "amax" if reduce == "max" else reduce)()
    found = gpkit.irm(weight=3.0, halves=halves, reduce=reduce)(net(x), y, env)
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(gradient(found, net), gradient(true, net))
    with pytest.raises(ValueError, match=r"`reduce=...` must be one of 'mean', 'sum', 'max'"):
        gpkit.irm(reduce="total")


def variances(net, x, y, env, names):
    """Return the variance of each entry of the last layer's gradients, ``[E, C * (d + 1)]``."""
    a = net[:-1](x)
    delta = net(x).softmax(1) - F.one_hot(y, 3)
    grads = torch.cat([(delta[:, :, None] * a[:, None]).flatten(1), delta], 1)
    return torch.stack([grads[env == e].var(0, correction=0) for e in names])


def test_fishr_has_moving_averages():
    # as in the authors' code: γ m + (1 - γ) v, divided by 1 - γ; m is a constant, of each
    # environment; an environment that was not seen begins at 0
    net, x, y, _ = scene()
    gamma, memory = 0.8, {}
    penalty = gpkit.fishr(weight=2.0, ema=gamma)
    for step, env in enumerate(
        ([2, 0, 0, 2, 0, 0], [2, 0, 5, 2, 0, 5], [0, 0, 0, 5, 5, 5], [2, 0, 5, 2, 0, 5])
    ):
        env, z = torch.tensor(env), x + step
        names = env.unique().tolist()
        v = variances(net, z, y, env, names)
        new = torch.stack(
            [gamma * memory.get(n, 0 * w) + (1 - gamma) * w for n, w in zip(names, v, strict=True)]
        )
        averaged = new / (1 - gamma)
        true = 2 * (averaged - averaged.mean(0)).square().mean(1).mean()
        both = gpkit.features(net, z)
        looked = penalty.terms(both, y, env).penalty  # looking does not update
        with torch.no_grad():
            assert penalty(gpkit.features(net, z), y, env) == looked
        found = penalty(both, y, env)
        torch.testing.assert_close(found, true)
        torch.testing.assert_close(looked, true)
        for one, other in zip(
            *(
                torch.autograd.grad(t, [*net.parameters()], retain_graph=True)
                for t in (found, true)
            ),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
        memory.update(zip(names, new.detach(), strict=True))
    kept = penalty.state_dict()["axes"]["statistic"]["averages"]
    assert sorted(kept) == [0, 2, 5]
    # the bias is the last column
    kept = {n: torch.tensor(m, dtype=torch.float64) for n, m in kept.items()}
    mine = {n: torch.cat([m[:, :-1].flatten(), m[:, -1]]) for n, m in kept.items()}
    torch.testing.assert_close(mine, memory)


def test_fishr_goes_on_from_a_checkpoint():
    net, x, y, env = scene()
    whole, first = gpkit.fishr(weight=1.0), gpkit.fishr(weight=1.0)
    for penalty in (whole, first):
        penalty(gpkit.features(net, x), y, env)
    second = gpkit.fishr(weight=1.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    values = [p(gpkit.features(net, x + 1), y, env) for p in (whole, second)]
    assert values[0] == values[1] != gpkit.fishr(weight=1.0)(gpkit.features(net, x + 1), y, env)
    assert second.state_dict() == whole.state_dict()
    fresh = gpkit.fishr(weight=1.0)
    fresh.load_state_dict({"step": 3, "draws": 2, "seed": 1})  # of a version without averages
    assert fresh.state_dict() == {"step": 3, "draws": 2, "seed": 1}


def test_fishr_ignores_an_overflow():
    net, x, y, env = scene()
    penalty = gpkit.fishr(weight=1.0)
    penalty(gpkit.features(net, x), y, env)
    kept = {n: m.clone() for n, m in penalty.statistic.averages.items()}
    assert not penalty(gpkit.features(net, x * math.nan), y, env).isfinite()
    torch.testing.assert_close(penalty.statistic.averages, kept)
    wider = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    refuse(
        ValueError,
        r"environment 0 is of a last layer \[3, 5\].*this one is \[3, 8\]: use a penalty of its",
        lambda: penalty(gpkit.features(wider, x), y, env),
    )
    refuse(ValueError, r"must be a number in \[0, 1\); got 1.0", lambda: gpkit.fishr(ema=1.0))


def averages_of_rank(rank):
    net, x, y, env = scene()
    penalty = gpkit.fishr(weight=1.0, ema=0.5)
    penalty(gpkit.features(net, x + rank), y, env + 2 * rank)  # 0 and 2; 2 and 4
    return {n: m.tolist() for n, m in penalty.statistic.averages.items()}


@pytest.mark.ddp
def test_ranks_share_the_moving_averages():
    # catches averages that drift apart, and ranks with different environments that wait forever
    net, x, y, env = scene()
    first, second = (variances(net, x + r, y, env, [0, 2]).detach() for r in (0, 1))
    true = {0: first[0] / 2, 2: (first[1] + second[0]) / 4, 4: second[1] / 2}
    found = ranks.run(averages_of_rank)
    assert found[0] == found[1]
    for name, v in true.items():
        m = torch.tensor(found[0][name], dtype=torch.float64)
        torch.testing.assert_close(torch.cat([m[:, :-1].flatten(), m[:, -1]]), v)


def test_default_weights_anneal():
    assert [gpkit.irm().weight_at(t) for t in (0, 499, 500)] == [1, 1, 100]
    assert [gpkit.fishr().weight_at(t) for t in (0, 1499, 1500)] == [0, 0, 1000]
    *_, y, env = scene()
    fishr = gpkit.fishr(every=2)
    assert fishr(lambda: 1 / 0, y, env) == 0  # nothing is evaluated
    assert fishr.state_dict() == {"step": 1, "draws": 0, "seed": None}


def test_without_grad_mode_there_is_a_value():
    net, x, y, env = scene()
    irm = gpkit.irm(weight=1.0)
    true = irm(net(x), y, env)
    with torch.no_grad():
        value = irm(net(x), y, env)
        called = irm(lambda: net(x), y, env)
    assert value == called == true
    assert not value.requires_grad
    assert not called.requires_grad


def test_sum_and_names():
    both = gpkit.sum({"irm": {"weight": 1.0}, "mine": {"preset": "irm", "weight": 2.0}})
    net, x, y, env = scene()
    logits = net(x)
    torch.testing.assert_close(both(logits, y, env), gpkit.irm(weight=3.0)(logits, y, env))


def refuse(error, said, call):
    with pytest.raises(error, match=said):
        call()


def test_refusals():
    net, x, y, env = scene()
    irm, fishr = gpkit.irm(weight=1.0), gpkit.fishr(weight=1.0)
    f, cut = net(x), net(x).detach()
    usage = r"use penalty\(logits, y, env\), or penalty\(\[\(logits_1, y_1\)"
    refuse(TypeError, f"got 1 arguments after the logits: {usage}", lambda: irm(f, y))
    refuse(TypeError, f"irm takes no real= or fake=: {usage}", lambda: irm(f, y, env, real=x))
    refuse(ValueError, r"integers \[B\].*float64 \[6\]", lambda: irm(f, y, env.double()))
    refuse(ValueError, "one entry for every sample; got 6, 6 and 5", lambda: irm(f, y, env[:5]))
    refuse(TypeError, r"y must be a tensor \[B\]; got a list", lambda: irm(f, [0], env))
    refuse(TypeError, r"takes \(logits, features\).*got a Tensor", lambda: fishr(f, y, env))
    refuse(
        TypeError, r"features must be .* \[6, d\]; got \[5, 2\]", lambda: fishr((f, x[:5]), y, env)
    )
    refuse(TypeError, r"\[B, C\] or \[B\]; got \[6, 3, 1\]", lambda: irm(f[..., None], y, env))
    refuse(RuntimeError, "any trained parameter: were the", lambda: irm(cut, y, env))
    mean = gpkit.irm(weight=1.0, loss=F.cross_entropy)
    refuse(ValueError, r'one loss per sample, \[6\].*reduction="none"', lambda: mean(f, y, env))
    constant = gpkit.irm(weight=1.0, loss=lambda f, y: f.detach().sum(1))
    refuse(RuntimeError, "does `loss=...` not depend on them", lambda: constant(f, y, env))
    refuse(ValueError, "the net has no nn.Linear", lambda: gpkit.features(nn.Tanh(), x))
    twice = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    twice.append(twice[0]).double()
    refuse(ValueError, "must run once; it ran 2 times", lambda: gpkit.features(twice, x))
