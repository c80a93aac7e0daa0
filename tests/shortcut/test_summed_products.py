"""The two products of the gradient in a wide weight are summed, and are those of a loop by hand."""

import pytest
import torch
from exact_steps import SCOPES, built, by_hand, loss_of, require_right
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.shortcut.products import summed


@pytest.fixture
def joined(monkeypatch):
    """Return a list with the shapes of the weights whose products are summed."""
    shapes, product = [], summed.product

    def noting(call, *parts):
        shapes.append((*call.layer.weight.shape, sum(part is not None for part in parts)))
        return product(call, *parts)

    monkeypatch.setattr(summed, "product", noting)
    monkeypatch.setattr(summed, "LARGE", 1000)
    return shapes


@pytest.mark.parametrize("scope", SCOPES)
def test_the_gradient_in_a_wide_weight_has_summed_products(scope, joined, looks):
    (net, batch), penalty = built("softsign"), SCOPES[scope][0](0.3)
    for size in (6, 6, 60):
        require_right(penalty, net, *batch(size), scope)
    assert joined == [(80, 90, 2)] * 2  # not in a large batch
    assert len(looks) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_a_backward_pass_by_summed_products_runs_again_where_it_may(scope, joined):
    (net, batch), penalty = built("softsign"), SCOPES[scope][0](0.3)
    x, t = batch(6)
    require_right(penalty, net, x, t, scope)
    params = list(net.parameters())
    expected = by_hand(net, x, t, scope)[1]
    total = penalty.with_loss(loss_of(net, x, t, scope), net)
    for _ in range(2):
        found = torch.autograd.grad(3 * total, params, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, 3 * other, rtol=1e-9, atol=1e-12)
    assert len(joined) == 3
    torch.autograd.grad(total, params)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(total, params)
    part = penalty.with_loss(loss_of(net, x, t, scope), net)
    (only,) = torch.autograd.grad(part, params[2])
    torch.testing.assert_close(only, expected[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own", ["own", "a bias", "a wide weight"])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_form_is_made_of_has_its_gradient(scope, own, joined, looks):
    net, batch = built("softsign")
    given = {"own": torch.tensor(2.0).double().requires_grad_(), "a bias": net[2].bias}
    factor = given.get(own, net[2].weight)
    form = lambda n: n * factor.square().sum()  # noqa: E731
    penalty, params = SCOPES[scope][0](0.3, form=form), [*net.parameters()]
    params += [factor] if own == "own" else []
    for _ in range(3):
        x, t = batch(6)
        found = torch.autograd.grad(penalty.with_loss(loss_of(net, x, t, scope), net), params)
        losses, n2 = F.cross_entropy(net(x), t, reduction="none"), []
        for y in losses.unbind() if scope == "sample" else [losses.mean()]:
            grads = torch.autograd.grad(y, list(net.parameters()), create_graph=True)
            n2.append(sum(g.square().sum() for g in grads))
        total = losses.mean() + 0.3 * form(torch.stack(n2).sqrt()).mean()
        for one, other in zip(found, torch.autograd.grad(total, params), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert len(joined) == (0 if own == "a wide weight" else 3)


class Tied(nn.Module):
    """A net that uses the weight of one of its layers once more, elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.head = nn.Linear(5, 90), nn.Linear(90, 90), nn.Linear(90, 3)

    def forward(self, x):
        h = torch.tanh(self.wide(torch.tanh(self.first(x))))
        return self.head(torch.tanh(F.linear(h, self.wide.weight)))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_weight_that_is_used_elsewhere_too_takes_two_products(scope, joined, looks):
    torch.manual_seed(0)
    net, penalty = Tied().double(), SCOPES[scope][0](0.3, wrt=gpkit.weights("first.*"))
    params = list(net.parameters())
    for _ in range(2):
        x, t = torch.randn(6, 5).double(), torch.randint(3, (6,))
        found = torch.autograd.grad(penalty.with_loss(loss_of(net, x, t, scope), net), params)
        losses, n2 = F.cross_entropy(net(x), t, reduction="none"), 0
        every = losses.unbind() if scope == "sample" else [losses.mean()]
        for y in every:
            grads = torch.autograd.grad(y, params[:2], create_graph=True)
            n2 = n2 + sum(g.square().sum() for g in grads) / len(every)
        for one, other in zip(
            found, torch.autograd.grad(losses.mean() + 0.3 * n2, params), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert (joined, len(looks)) == ([], 1)


def test_a_hook_of_a_weight_sees_its_gradient(joined):
    (net, batch), penalty, seen = built("softsign"), gpkit.per_sample_grad_norm(0.3), []
    x, t = batch(6)
    penalty.with_loss(loss_of(net, x, t, "sample"), net)
    with net[2].weight.register_hook(lambda g: seen.append(g.clone())):
        penalty.with_loss(loss_of(net, x, t, "sample"), net).backward()
    assert len(joined) == 1
    torch.testing.assert_close(seen[-1], by_hand(net, x, t, "sample")[1][2])
