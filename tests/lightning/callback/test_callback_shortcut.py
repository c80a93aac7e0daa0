"""The callback's shortcut for plain penalties trains exactly as a call with arguments does."""

import copy
from dataclasses import replace

import pytest
import torch
from fits import batches, callback, fit, penalty
from modules import Plain
from nets import net

import gpkit
from gpkit.estimators.base import Target
from gpkit.needs import needs_of


@pytest.mark.parametrize("where", ["weight", "input"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_fit_with_the_shortcut_is_bit_for_bit_one_without(where, every, monkeypatch):
    """Weights, and the state of the penalty: which way it went is not to be seen."""
    plain = []

    def never(given):
        needs = needs_of(given)
        plain.append(needs.plain)
        return replace(needs, plain=False)

    fits = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr("gpkit.lightning.callback.step.needs_of", never)
        added = callback(where, every=every)
        module = fit(Plain(net()), added, batches())
        fits.append((module.state_dict(), added.state_dict()))
    assert plain == [True]  # the shortcut was there to be taken
    (ours, state), (others, other) = fits
    assert state == other
    assert all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize("where", ["weight", "input"])
def test_a_ready_target_is_what_a_call_reads_out_of_its_arguments(where):
    f, (x, y) = net(), batches(1)[0]
    x = x.requires_grad_()
    losses = torch.nn.functional.cross_entropy(f(x), y, reduction="none")
    params = tuple(f.parameters())
    called, ready = penalty(where, seed=0), penalty(where, seed=0)
    if where == "weight":
        arguments, target = (losses.mean(), params), Target(losses.mean(), params, False)
    else:
        size = torch.tensor(float(len(x)), dtype=torch.float64)
        arguments, target = (losses, x), Target(losses.mean(), (x,), True, times=size)
    expected, found = called.act(*arguments), ready.act(target)
    torch.testing.assert_close(found.squared_norms, expected.squared_norms, rtol=1e-14, atol=0)
    slopes = [torch.autograd.grad(t.penalty, params, retain_graph=True) for t in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
    assert ready.state_dict() == called.state_dict()
    assert isinstance(copy.deepcopy(ready), gpkit.GradientPenalty)
