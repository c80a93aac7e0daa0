"""Double backward passes that are written out: those of autograd, and taken where they may be."""

import gc
import weakref

import pytest
import torch
from exact_steps import SCOPES, by_hand, loss_of
from exact_steps import require_right as require_right_step
from plain_critics import require_right, samples
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.shortcut.chains import losses, nodes

FUNCTIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "leaky relu": nn.LeakyReLU(0.3),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "softplus": nn.Softplus(beta=3, threshold=2),
    "elu": nn.ELU(1.3),
    "selu": nn.SELU(),
}
OTHERS = {"gelu by tanh": nn.GELU("tanh"), "softsign": nn.Softsign(), "mish": nn.Mish()}


@pytest.fixture
def written(monkeypatch):
    """Return a list with the kind of each backward pass that was written out."""
    kinds = []
    for kind in (nodes.InputGradient, nodes.Total):
        run = kind.backward

        def noting(ctx, grad, run=run, kind=kind):
            kinds.append(kind.__name__)
            return run(ctx, grad)

        monkeypatch.setattr(kind, "backward", staticmethod(noting))
    return kinds


def net(function, *widths, bias=True):
    torch.manual_seed(0)
    sizes = zip((5, *widths[:-1]), widths, strict=True)
    layers = [part for p, q in sizes for part in (nn.Linear(p, q, bias=bias), function)]
    return nn.Sequential(*layers[:-1]).double()


def value(n2):
    return n2 + (n2.sqrt() - 1) ** 2


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("function", [*FUNCTIONS, *OTHERS])
def test_a_penalty_in_inputs_is_that_of_a_loop(function, bias, written):
    """Sample by sample, with unequal slopes, and with inputs in each piece of a function."""
    critic, penalty = net({**FUNCTIONS, **OTHERS}[function], 7, 6, 1, bias=bias), gpkit.r1(weight=2)
    for size in (4, 4, 3):
        require_right(penalty, critic, samples(size, 5), lambda n2: n2)
    # The first call takes one more backward pass, to see whether the penalty trains anything.
    assert written == ["InputGradient"] * (4 if function in FUNCTIONS else 0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("function", [*FUNCTIONS, *OTHERS])
def test_a_step_with_a_penalty_in_the_weights_is_that_of_a_loop(function, scope, written):
    model, penalty = net({**FUNCTIONS, **OTHERS}[function], 7, 6, 3), SCOPES[scope][0](0.3)
    for size in (4, 4, 3):
        require_right_step(
            penalty, model, 2 * torch.randn(size, 5).double(), torch.randint(3, (size,)), scope
        )
    assert written == ["Total"] * (3 if function in FUNCTIONS else 0)


def test_gram_matrices_give_way_to_the_gradient_in_a_large_batch(written, monkeypatch):
    model, penalty, shapes = net(nn.SiLU(), 90, 80, 3), gpkit.weight_grad_norm(0.3), []
    product = losses.gram_product
    noting = lambda left, right: shapes.append(left.shape[0]) or product(left, right)  # noqa: E731
    monkeypatch.setattr(losses, "gram_product", noting)
    for size in (6, 500, 8):
        x, t = torch.randn(size, 5).double(), torch.randint(3, (size,))
        require_right_step(penalty, model, x, t, "batch")
    assert shapes == [6, 8]
    assert written == ["Total"] * 3


FROZEN = {  # and whether the pass is written out all the same
    "first layer": (["0.weight", "0.bias"], False),
    "weight": (["2.weight"], False),
    "bias": (["2.bias"], True),
    "last layer": (["4.weight", "4.bias"], False),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_has_no_gradient(frozen, written):
    critic = net(nn.SiLU(), 7, 6, 1)
    names, out = FROZEN[frozen]
    for name in names:
        critic.get_parameter(name).requires_grad_(False)
    penalty = gpkit.r1(weight=2)
    for _ in range(3):
        require_right(penalty, critic, samples(4, 5), lambda n2: n2)
    assert written == ["InputGradient"] * (4 if out else 0)
    model = net(nn.SiLU(), 7, 6, 3)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    penalty = gpkit.per_sample_grad_norm(0.3)
    for _ in range(2):
        x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))
        require_right_step(penalty, model, x, t, "sample")


TAILS = {
    "squeeze": (lambda y: y.squeeze(1), True),
    "column": (lambda y: y[:, 0], True),
    "factor": (lambda y: -3 * y, True),
    "sigmoid": (torch.sigmoid, False),
    "two uses": (lambda y: y + y * y, False),
}


@pytest.mark.parametrize("tail", TAILS)
def test_what_follows_the_last_layer(tail, written):
    follow, constant = TAILS[tail]
    critic = net(nn.Tanh(), 7, 6, 1)
    penalty, x = gpkit.r1(weight=2), samples(4, 5)
    for _ in range(3):
        found = penalty(lambda z: follow(critic(z)), real=x)
        rows = []
        for point in x:
            z = point[None].clone().requires_grad_()
            rows += torch.autograd.grad(follow(critic(z)).sum(), z, create_graph=True)
        expected = torch.cat(rows).square().sum(1).mean()
        torch.testing.assert_close(found, expected)
        parameters = list(critic.parameters())
        one, other = (
            torch.autograd.grad(y, parameters, allow_unused=True) for y in (found, expected)
        )
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert bool(written) == constant


class Residual(nn.Module):
    """A net whose hidden layer has a path beside it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.second(h)))


class Tied(Residual):
    """A net that uses a weight twice."""

    def forward(self, x):
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(F.linear(h, self.second.weight)))


class Beside(Residual):
    """A net whose input goes to its output as well."""

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))) + x.square().sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [Residual, Tied, Beside])
def test_a_net_with_more_than_a_chain_takes_autograds_way(kind, written):
    torch.manual_seed(0)
    critic, penalty = kind().double(), gpkit.r1(weight=2)
    for _ in range(3):
        require_right(penalty, critic, samples(4, 5), lambda n2: n2)
    assert not written


@pytest.mark.parametrize("scope", SCOPES)
def test_a_loss_with_parameters_of_its_own_and_hidden_values(scope, written):
    """A temperature behind the chain has both its gradients; a hidden value elsewhere ends it."""
    model, heat = net(nn.SiLU(), 7, 6, 3), nn.Parameter(torch.tensor(1.3).double())
    params = [*model.parameters(), heat]
    for uses_hidden in (False, True):
        written.clear()
        penalty = SCOPES[scope][0](0.3)
        for _ in range(3):
            x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))

            def losses(x=x, t=t, uses_hidden=uses_hidden):
                h = model[:4](x)
                found = F.cross_entropy(model[4](h) * heat, t, reduction="none")
                return found + h.square().sum(1) if uses_hidden else found

            closure = losses if scope == "sample" else lambda losses=losses: losses().mean()
            found = torch.autograd.grad(penalty.with_loss(closure, model), params)
            every = losses()
            n2 = []
            for y in every.unbind() if scope == "sample" else [every.mean()]:
                grads = torch.autograd.grad(y, params[:-1], create_graph=True)
                n2.append(sum(g.square().sum() for g in grads))
            total = every.mean() + 0.3 * torch.stack(n2).mean()
            for a, b in zip(found, torch.autograd.grad(total, params), strict=True):
                torch.testing.assert_close(a, b)
        assert written == ([] if uses_hidden else ["Total"] * 3)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_third_derivative(scope):
    model, penalty = net(nn.SiLU(), 7, 3), SCOPES[scope][0](0.3)
    critic, r1 = net(nn.SiLU(), 7, 1), gpkit.r1(weight=2)
    x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))

    def twice(total, params):
        grads = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
        length = sum(g.square().sum() for g in grads if g is not None)
        return torch.autograd.grad(length, params, allow_unused=True)

    params = list(model.parameters())
    for _ in range(3):
        found = twice(penalty.with_loss(loss_of(model, x, t, scope), model), params)
        losses, n2 = F.cross_entropy(model(x), t, reduction="none"), []
        for y in losses.unbind() if scope == "sample" else [losses.mean()]:
            grads = torch.autograd.grad(y, params, create_graph=True)
            n2.append(sum(g.square().sum() for g in grads))
        for a, b in zip(
            found, twice(losses.mean() + 0.3 * torch.stack(n2).mean(), params), strict=True
        ):
            torch.testing.assert_close(a, b)
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(z).sum(), z, create_graph=True)
        own = list(critic.parameters())
        expected = twice(g.square().sum(1).mean(), own)
        for a, b in zip(twice(r1(critic, real=x), own), expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_it_runs_again_only_where_the_graph_is_retained():
    model, penalty = net(nn.SiLU(), 7, 3), gpkit.per_sample_grad_norm(0.3)
    critic, r1 = net(nn.SiLU(), 7, 1), gpkit.r1(weight=2)
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
    model, penalty = net(nn.SiLU(), 7, 3), gpkit.per_sample_grad_norm(0.3)
    critic, r1 = net(nn.SiLU(), 7, 1), gpkit.r1(weight=2)
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


@pytest.mark.parametrize("own", ["weight", "bias"])
def test_a_form_that_is_made_of_a_parameter_of_the_chain(own, written):
    model = net(nn.SiLU(), 7, 6, 3)
    factor, params = getattr(model[2], own), list(model.parameters())
    penalty = gpkit.per_sample_grad_norm(0.3, form=lambda n: n * factor.square().sum())
    for _ in range(3):
        x, t = torch.randn(4, 5).double(), torch.randint(3, (4,))
        found = torch.autograd.grad(
            penalty.with_loss(loss_of(model, x, t, "sample"), model), params
        )
        losses, n2 = F.cross_entropy(model(x), t, reduction="none"), []
        for y in losses.unbind():
            grads = torch.autograd.grad(y, params, create_graph=True)
            n2.append(sum(g.square().sum() for g in grads))
        total = losses.mean() + 0.3 * (torch.stack(n2).sqrt() * factor.square().sum()).mean()
        for a, b in zip(found, torch.autograd.grad(total, params), strict=True):
            torch.testing.assert_close(a, b)
    assert not written


def test_a_backward_pass_lets_go_of_the_graph():
    """As autograd's does, while the total is still there."""
    hidden, model = [], net(nn.SiLU(), 7, 6, 3)
    penalty, critic, r1 = gpkit.per_sample_grad_norm(0.3), net(nn.SiLU(), 7, 1), gpkit.r1(weight=2)
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
        gpkit.r1()(net(nn.SiLU(), 7, 1), real=samples(4, 5)).backward()
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
        model = net(function, width, width, 3).float()
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
    critic = net(nn.SiLU(), 7, 6, 1).float()
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
