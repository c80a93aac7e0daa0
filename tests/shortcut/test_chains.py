"""Double backward passes that are written out: those of autograd, and taken where they may be."""

import pytest
import torch
from exact_steps import SCOPES, loss_of
from exact_steps import require_right as require_right_step
from plain_critics import chain, require_right, samples
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.shortcut.chains import losses

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


def value(n2):
    return n2 + (n2.sqrt() - 1) ** 2


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("function", [*FUNCTIONS, *OTHERS])
def test_a_penalty_in_inputs_is_that_of_a_loop(function, bias, written):
    """Sample by sample, with unequal slopes, and with inputs in each piece of a function."""
    critic, penalty = (
        chain({**FUNCTIONS, **OTHERS}[function], 7, 6, 1, bias=bias),
        gpkit.r1(weight=2),
    )
    for size in (4, 4, 3):
        require_right(penalty, critic, samples(size, 5), lambda n2: n2)
    # The first call takes one more backward pass, to see whether the penalty trains anything.
    assert written == ["InputGradient"] * (4 if function in FUNCTIONS else 0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("function", [*FUNCTIONS, *OTHERS])
def test_a_step_with_a_penalty_in_the_weights_is_that_of_a_loop(function, scope, written):
    model, penalty = chain({**FUNCTIONS, **OTHERS}[function], 7, 6, 3), SCOPES[scope][0](0.3)
    for size in (4, 4, 3):
        require_right_step(
            penalty, model, 2 * torch.randn(size, 5).double(), torch.randint(3, (size,)), scope
        )
    assert written == ["Total"] * (3 if function in FUNCTIONS else 0)


def test_gram_matrices_give_way_to_the_gradient_in_a_large_batch(written, monkeypatch):
    model, penalty, shapes = chain(nn.SiLU(), 90, 80, 3), gpkit.weight_grad_norm(0.3), []
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
    critic = chain(nn.SiLU(), 7, 6, 1)
    names, out = FROZEN[frozen]
    for name in names:
        critic.get_parameter(name).requires_grad_(False)
    penalty = gpkit.r1(weight=2)
    for _ in range(3):
        require_right(penalty, critic, samples(4, 5), lambda n2: n2)
    assert written == ["InputGradient"] * (4 if out else 0)
    model = chain(nn.SiLU(), 7, 6, 3)
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
    critic = chain(nn.Tanh(), 7, 6, 1)
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
    model, heat = chain(nn.SiLU(), 7, 6, 3), nn.Parameter(torch.tensor(1.3).double())
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
    model, penalty = chain(nn.SiLU(), 7, 3), SCOPES[scope][0](0.3)
    critic, r1 = chain(nn.SiLU(), 7, 1), gpkit.r1(weight=2)
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


@pytest.mark.parametrize("own", ["weight", "bias"])
def test_a_form_that_is_made_of_a_parameter_of_the_chain(own, written):
    model = chain(nn.SiLU(), 7, 6, 3)
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
