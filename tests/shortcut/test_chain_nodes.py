"""A double backward pass that is written out is freed, refused and watched as autograd's."""

import gc
import weakref

import pytest
import torch
from exact_steps import SCOPES, by_hand, loss_of
from plain_critics import chain, samples
from torch import nn
from torch.nn import functional as F

import gpkit


def test_it_runs_again_only_where_the_graph_is_retained():
    model, penalty = chain(nn.SiLU(), 7, 3), gpkit.per_sample_grad_norm(0.3)
    critic, r1 = chain(nn.SiLU(), 7, 1), gpkit.r1(weight=2)
    x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))
    for _ in range(2):
        for total in (
            penalty.with_loss(loss_of(model, x, t, "sample"), model),
            r1(critic, real=x),
        ):
            total.backward(retain_graph=True)
            total.backward()
            with pytest.raises(RuntimeError, match="retain_graph=True"):
                total.backward()


@pytest.mark.parametrize("when", [0, 2])
def test_weights_that_are_written_to_before_the_backward_pass_are_refused(when):
    """As autograd does: an optimiser's step between the passes would give another gradient."""
    model, penalty = chain(nn.SiLU(), 7, 3), gpkit.per_sample_grad_norm(0.3)
    critic, r1 = chain(nn.SiLU(), 7, 1), gpkit.r1(weight=2)
    x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))
    for step in range(3):
        totals = penalty.with_loss(loss_of(model, x, t, "sample"), model), r1(critic, real=x)
        if step == when:
            with torch.no_grad():
                model[2].weight.mul_(2)
                critic[2].weight.mul_(2)
            for total in totals:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    total.backward()


class Watched(nn.Module):
    """A net that looks at the gradients of its hidden values, or changes them, from a step on."""

    def __init__(self, function, place, what, since):
        super().__init__()
        self.function = function
        self.first, self.second, self.last = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)
        self.place, self.what, self.since = place, what, since
        self.calls, self.seen = 0, []

    def forward(self, x):
        z = self.second(self.function(self.first(x)))
        a = self.function(z)
        h = {"z": z, "a": a}[self.place]
        if self.calls >= self.since and h.requires_grad:
            if self.what == "keep":
                h.retain_grad()
                self.kept = h
            else:
                h.register_hook(self.hook)
        self.calls += 1
        return self.last(a)

    def hook(self, g):
        self.seen.append(g)
        return g.clamp(-0.01, 0.01) if self.what == "clamp" else None


# A graph has not saved z of a tanh, so a hook on it that comes later is not seen. One that changes
# the gradient at the output of a layer is looked for in the first step of norms of samples alone.
@pytest.mark.parametrize("function", ["silu", "tanh"])
@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("place", ["z", "a"])
@pytest.mark.parametrize("what", ["look", "keep", "clamp"])
def test_hooks_on_hidden_values_are_called(what, place, since, function):
    if place == "z" and (since, what) == (2, "clamp"):
        pytest.skip("not looked for")
    if function == "tanh" and place == "z" and (since or what == "keep"):
        pytest.skip("not seen")
    torch.manual_seed(0)
    model = Watched(getattr(F, function), place, what, since).double()
    penalty, calls = gpkit.per_sample_grad_norm(0.3), []
    x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))
    for _ in range(4):
        model.seen.clear()
        model.kept = None
        total = penalty.with_loss(loss_of(model, x, t, "sample"), model)
        found = torch.autograd.grad(total, list(model.parameters()))
        calls.append(len(model.seen))
        if what == "keep" and model.calls > since:
            assert model.kept.grad is not None
        model.calls -= 1  # for the same step by hand
        for a, b in zip(found, by_hand(model, x, t, "sample")[1], strict=True):
            torch.testing.assert_close(a, b)
    acting = [model.calls - 4 + i >= since for i in range(4)]
    if what != "keep":
        assert [bool(n) for n in calls] == acting


def test_a_backward_pass_lets_go_of_the_graph():
    """As autograd's does, while the total is still there."""
    hidden, model = [], chain(nn.SiLU(), 7, 6, 3)
    penalty, critic, r1 = (
        gpkit.per_sample_grad_norm(0.3),
        chain(nn.SiLU(), 7, 1),
        gpkit.r1(weight=2),
    )
    x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))

    def noting(function):
        def run(z):
            h = function[:2](z)
            hidden.append(weakref.ref(h))
            return function[2:](h)

        return run

    for _ in range(3):
        loss = lambda: F.cross_entropy(noting(model)(x), t, reduction="none")  # noqa: E731
        totals = penalty.with_loss(loss, model), r1(noting(critic), real=x)
        assert all(ref() is not None for ref in hidden[-2:])
        for total in totals:
            total.backward()
        assert not any(ref() is not None for ref in hidden)


def test_what_is_collected_meanwhile_is_no_hook(written):
    """What runs code of Python in the middle of a backward pass, and no hook has called it."""
    before, runs = gc.get_threshold(), []
    noting = lambda phase, info: runs.append(phase)  # noqa: E731
    gc.callbacks.append(noting)
    gc.set_threshold(1)
    try:
        gpkit.r1()(chain(nn.SiLU(), 7, 1), real=samples(4, 5)).backward()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(noting)
    assert runs
    assert written


@pytest.mark.parametrize("width", [7, 600])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_first_step_has_the_bits_of_a_later_one(scope, width):
    """So a run that goes on from a checkpoint is the one that was never stopped."""
    for function in (nn.SiLU(), nn.Softsign()):
        model = chain(function, width, width, 3).float()
        x, t = torch.randn(4, 5), torch.randint(3, (4,))
        params, later = list(model.parameters()), SCOPES[scope][0](0.3)
        closure = loss_of(model, x, t, scope)
        for _ in range(3):
            totals = [p.with_loss(closure, model) for p in (SCOPES[scope][0](0.3), later)]
            assert torch.equal(*totals)
            for a, b in zip(*(torch.autograd.grad(y, params) for y in totals), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("running", [True, False], ids=["running average", "norm"])
def test_a_first_call_has_the_bits_of_a_later_one(running):
    critic = chain(nn.SiLU(), 7, 6, 1).float()
    parameters = list(critic.parameters())
    forms = [gpkit.two_sided(gpkit.running_average(0.9)) if running else "norm" for _ in range(2)]
    pair = [gpkit.GradientPenalty(form=form, weight=2.0, seed=1) for form in forms]
    for step in range(4):
        x = samples(4, 5).float() + step
        fresh, later = pair
        fresh.shortcuts = type(fresh.shortcuts)()
        found = [p(critic, real=x) for p in (fresh, later)]
        assert torch.equal(*found)
        for a, b in zip(
            *(torch.autograd.grad(y, parameters, allow_unused=True) for y in found), strict=True
        ):
            assert (a is b is None) or torch.equal(a, b)
