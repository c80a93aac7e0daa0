"""Gram matrices for the weights of a loss that is given with its graph alone, without the net."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gpkit
from gpkit.autodiff.layers import batch

B = 7


@pytest.fixture
def products(monkeypatch):
    """Return a list of the sizes of the weights that Gram matrices stood for."""
    sizes, product = [], batch.gram_product

    def noting(left, right):
        sizes.append((left.shape[-1], right.shape[-1]))
        return product(left, right)

    monkeypatch.setattr(batch, "gram_product", noting)
    return sizes


def net(bias=True):
    torch.manual_seed(0)
    wide = nn.Linear(80, 90, bias=bias)
    return nn.Sequential(nn.Linear(5, 80), nn.Tanh(), wide, nn.SiLU(), nn.Linear(90, 3)).double()


def two_products(made, x):
    """The weight is used twice, once by a product with its transpose and once by another."""
    h = torch.tanh(made[0](x))
    return made[4](torch.tanh(made[2](h)) + h @ made[2].weight.t())


def one_transpose(made, x):
    h, transpose = torch.tanh(made[0](x)), made[2].weight.t()
    return made[4](torch.tanh(h @ transpose) + transpose.square().mean(0))


def scaled(made, x):
    h = torch.tanh(made[0](x))
    return made[4](torch.tanh(torch.addmm(made[2].bias, h, made[2].weight.t(), alpha=3)))


def without_transpose(made, x):
    return made[4](torch.tanh(torch.tanh(made[0](x)) @ made[2].weight.reshape(80, 90)))


def checkpointed(made, x):
    h = torch.tanh(made[0](x))
    return made[4](checkpoint(made[2], h, use_reentrant=False))


def inner_write(made, x):
    """The rows are a leaf's own copy that is written to before, not after."""
    h = torch.tanh(made[0](x)).clone()
    h.mul_(2)
    return made[4](torch.tanh(made[2](h)))


WAYS = {
    "the net": (lambda made, x: made(x), True),
    "sequences": (lambda made, x: made(x[:, None, :].expand(-1, 2, -1) * 1.5).mean(1), True),
    "written before": (inner_write, True),
    "two products": (two_products, False),
    "one transpose": (one_transpose, False),
    "scaled": (scaled, False),
    "reshaped": (without_transpose, False),
    "checkpointed": (checkpointed, False),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("given", ["module", "list"])
def test_the_norm_of_a_loss_with_its_graph(name, given, products):
    output, by_products = WAYS[name]
    made, x, t = net(), torch.randn(B, 5).double(), torch.randint(3, (B,))
    params = list(made.parameters())
    loss = F.cross_entropy(output(made, x), t)
    found = gpkit.weight_grad_norm(0.3)(loss, made if given == "module" else made.parameters())
    assert products == ([(90, 80)] if by_products else [])
    found_grads = torch.autograd.grad(loss + found, params, allow_unused=True)
    loss = F.cross_entropy(output(made, x), t)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    expected = 0.3 * sum(g.square().sum() for g in grads if g is not None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(
        found_grads, torch.autograd.grad(loss + expected, params, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_weights_without_a_bias_and_those_of_a_pattern(products):
    made, x = net(bias=False), torch.randn(B, 5).double()
    loss = made(x).square().mean()
    whole = gpkit.weight_grad_norm(1.0)(loss, made)
    assert products == [(90, 80)]
    first = gpkit.weight_grad_norm(1.0, wrt=gpkit.weights("0.*"))(loss, made)
    assert products == [(90, 80)]
    grads = torch.autograd.grad(loss, list(made.parameters()))
    sizes = [g.square().sum() for g in grads]
    torch.testing.assert_close(whole.detach(), sum(sizes), rtol=1e-12, atol=0)
    torch.testing.assert_close(first.detach(), sum(sizes[:2]), rtol=1e-12, atol=0)


def test_a_gradient_is_cheaper_in_a_large_batch(products):
    made, x = net(), torch.randn(400, 5).double()
    gpkit.weight_grad_norm(1.0)(made(x).square().mean(), made)
    assert products == []


def test_half_precision_takes_the_gradient(products):
    made, x = net().float(), torch.randn(B, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(x).float().square().mean()
    found = gpkit.weight_grad_norm(1.0)(loss, made)
    assert products == []
    grads = torch.autograd.grad(loss, list(made.parameters()))
    torch.testing.assert_close(found.detach(), sum(g.square().sum() for g in grads))


def test_complex_weights_take_the_gradient(products):
    weight = torch.randn(90, 80, dtype=torch.complex128, requires_grad=True)
    loss = (torch.randn(B, 80, dtype=torch.complex128) @ weight.t()).abs().square().mean()
    found = gpkit.weight_grad_norm(1.0)(loss, [weight])
    assert products == []
    (g,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found.detach(), g.abs().square().sum())


def test_a_third_derivative(products):
    made, x = net(), torch.randn(B, 5).double()
    params = list(made.parameters())
    penalty = gpkit.weight_grad_norm(1.0)

    def both(by_hand):
        loss = made(x).square().mean()
        if not by_hand:
            return penalty(loss, made)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return sum(g.square().sum() for g in grads)

    seconds = []
    for by_hand in (False, True):
        firsts = torch.autograd.grad(both(by_hand), params, create_graph=True)
        total = sum((g * (i + 1)).sum() for i, g in enumerate(firsts))
        seconds.append(torch.autograd.grad(total, params))
    assert products == [(90, 80)]
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def plain_steps(output, monkeypatch, given="module"):
    """Compare three calls with losses of new graphs, and count those that take the long way."""
    made, penalty, taken = net(), gpkit.weight_grad_norm(0.3), []
    evaluate = gpkit.GradientPenalty.evaluate

    def counting(self, *args, **kwargs):
        taken.append(1)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(gpkit.GradientPenalty, "evaluate", counting)
    for size in (7, 7, 5, 300):
        x = torch.randn(size, 5).double()
        params = list(made.parameters())
        loss = output(made, x).square().mean()
        found = penalty(loss, made if given == "module" else made.parameters())
        found_grads = torch.autograd.grad(loss + found, params, allow_unused=True)
        loss = output(made, x).square().mean()
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        expected = 0.3 * sum(g.square().sum() for g in grads if g is not None)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for one, other in zip(
            found_grads,
            torch.autograd.grad(loss + expected, params, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
        with torch.no_grad():
            for p in params:
                p.mul_(1.05)
    assert penalty.step == penalty.draws == 4
    return len(taken)


@pytest.mark.parametrize("given", ["module", "generator"])
@pytest.mark.parametrize("name", ["the net", "sequences", "one transpose"])
def test_a_repeated_call_with_a_loss_does_its_arithmetic_alone(name, given, monkeypatch):
    assert plain_steps(WAYS[name][0], monkeypatch, given) == 1


def test_a_loss_with_another_graph_takes_the_long_way(monkeypatch):
    calls = []

    def branching(made, x):
        calls.append(1)
        return made(x) if len(calls) < 5 else made[4](made[2](torch.tanh(made[0](x))).sin())

    assert plain_steps(branching, monkeypatch) == 2


def test_a_part_of_the_parameters_is_not_taken_for_the_whole():
    made, x, penalty = net(), torch.randn(B, 5).double(), gpkit.weight_grad_norm(1.0)
    some = [list(made.parameters())[i] for i in (0, 2, 3)]
    for given in (made, some, made[2:], made, some, made[2:]):
        params = list(given.parameters()) if isinstance(given, nn.Module) else given
        loss = made(x).square().mean()
        sizes = [g.square().sum() for g in torch.autograd.grad(loss, params, retain_graph=True)]
        torch.testing.assert_close(penalty(loss, given).detach(), sum(sizes), rtol=1e-12, atol=0)
