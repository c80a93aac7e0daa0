"""A repeated step of with_loss with exact norms takes the shortcut, and is right."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.shortcut import one_product


class Tokens(nn.Module):
    """Embedding, norm and linear layers on sequences; one of them runs twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        h = torch.tanh(self.mix(self.norm(self.embedding(x))))
        return self.head(torch.tanh(self.mix(h)).mean(1))


def wide():
    """Return a net in which Gram matrices pay at batches up to some 60."""
    return nn.Sequential(
        nn.Linear(5, 90), nn.SiLU(), nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 3)
    )


def images():
    return nn.Sequential(
        *[nn.Conv2d(2, 4, 3, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 2), nn.Tanh()],
        *[nn.Flatten(), nn.BatchNorm1d(4).eval(), nn.Linear(4, 3)],
    )


CASES = {
    "wide": (wide, lambda b: torch.randn(b, 5)),
    "images": (images, lambda b: torch.randn(b, 2, 6, 6)),
    "tokens": (Tokens, lambda b: torch.randint(7, (b, 4))),
}
SCOPES = {
    "batch": (gpkit.weight_grad_norm, "mean"),
    "sample": (gpkit.per_sample_grad_norm, "none"),
}


@pytest.fixture
def long_way(monkeypatch):
    """Return a list with an entry for each step that takes the long way."""
    taken, evaluate = [], gpkit.GradientPenalty.evaluate

    def counting(self, *args, **kwargs):
        taken.append(1)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(gpkit.GradientPenalty, "evaluate", counting)
    return taken


def built(name):
    torch.manual_seed(0)
    make, samples = CASES[name]
    net = make().double()

    def batch(size):
        x = samples(size)
        return (x.double() if x.is_floating_point() else x), torch.randint(3, (size,))

    return net, batch


def by_hand(net, x, t, scope, form=lambda n2: n2, weight=0.3):
    """Return loss and penalty, and their gradients, from a gradient for each loss."""
    params = [p for p in net.parameters() if p.requires_grad]
    losses = F.cross_entropy(net(x), t, reduction="none")
    every = losses.unbind() if scope == "sample" else [losses.mean()]
    n2 = []
    for y in every:
        grads = torch.autograd.grad(y, params, create_graph=True, allow_unused=True)
        n2.append(sum(g.square().sum() for g in grads if g is not None))
    total = losses.mean() + weight * form(torch.stack(n2)).mean()
    return total.detach(), torch.autograd.grad(total, params, allow_unused=True)


def loss_of(net, x, t, scope):
    """Return a closure, made anew at each step as in a loop over batches."""
    return lambda: F.cross_entropy(net(x), t, reduction=SCOPES[scope][1])


def require_right(penalty, net, x, t, scope, **by):
    for p in net.parameters():
        p.grad = None
    total = penalty.with_loss(loss_of(net, x, t, scope), net)
    total.backward()
    expected, grads = by_hand(net, x, t, scope, **by)
    torch.testing.assert_close(total.detach(), expected, rtol=1e-10, atol=0)
    found = [p.grad for p in net.parameters() if p.requires_grad]
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", CASES)
def test_repeated_steps_are_those_of_a_loop(name, scope, long_way):
    (net, batch), penalty = built(name), SCOPES[scope][0](0.3)
    for size in (6, 6, 3, 1):
        require_right(penalty, net, *batch(size), scope)
        with torch.no_grad():  # as a step of an optimiser does
            for p in net.parameters():
                p.mul_(1.05)
    assert len(long_way) == 1
    assert penalty.step == penalty.draws == 4


def test_gram_matrices_give_way_to_the_gradient_in_a_large_batch(long_way, monkeypatch):
    (net, batch), penalty = built("wide"), gpkit.weight_grad_norm(0.3)
    shapes = []
    product = gpkit.autodiff.layers.batch.gram_product
    noting = lambda left, right: shapes.append(left.shape[0]) or product(left, right)  # noqa: E731
    monkeypatch.setattr(gpkit.autodiff.layers.batch, "gram_product", noting)
    for size in (6, 500, 8):
        require_right(penalty, net, *batch(size), "batch")
    assert len(long_way) == 1
    assert shapes == [6, 8]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_form_of_the_norm_and_a_third_derivative(scope, long_way):
    net, batch = built("wide")
    penalty = SCOPES[scope][0](0.3, form=gpkit.two_sided(0.5))
    form = lambda n2: (n2.sqrt() - 0.5) ** 2  # noqa: E731
    for _ in range(2):
        x, t = batch(4)
        require_right(penalty, net, x, t, scope, form=form)
    assert len(long_way) == 1
    params = list(net.parameters())
    total = penalty.with_loss(loss_of(net, x, t, scope), net)
    first = torch.autograd.grad(total, params, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), params)
    assert len(long_way) == 1

    def gradient_at(move):
        with torch.no_grad():
            for p in params:
                p.add_(move)
        grads = by_hand(net, x, t, scope, form=form)[1]
        with torch.no_grad():
            for p in params:
                p.sub_(move)
        return sum(g.sum() for g in grads)

    expected = (gradient_at(1e-5) - gradient_at(-1e-5)) / 2e-5
    torch.testing.assert_close(sum(g.sum() for g in second), expected, rtol=1e-5, atol=0)


def frozen(net):
    net.mix.bias.requires_grad_(False)


def replaced(net):
    net.head = nn.Linear(6, 3).double()


def another_order(net):
    net.forward = lambda x: net.head(
        torch.tanh(net.norm(net.mix(net.mix(net.embedding(x))))).mean(1)
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("change", [frozen, replaced, another_order])
def test_a_net_that_changed_takes_the_long_way(change, scope, long_way):
    (net, batch), penalty = built("tokens"), SCOPES[scope][0](0.3)
    for _ in range(2):
        require_right(penalty, net, *batch(4), scope)
    assert len(long_way) == 1
    change(net)
    for _ in range(2):
        require_right(penalty, net, *batch(4), scope)
    assert len(long_way) > 1


def test_batch_norm_in_another_mode_takes_the_long_way(long_way):
    (net, batch), penalty = built("images"), gpkit.per_sample_grad_norm(0.3)
    for _ in range(2):
        require_right(penalty, net, *batch(4), "sample")
    assert len(long_way) == 1
    net[6].train()
    with pytest.warns(UserWarning, match="backward pass for each sample"):
        require_right(penalty, net, *batch(4), "sample")
    assert len(long_way) == 2


@pytest.mark.parametrize("scope", SCOPES)
def test_inputs_that_require_grad_are_not_taken_for_another_net(scope, long_way):
    (net, batch), penalty = built("wide"), SCOPES[scope][0](0.3)
    for _ in range(3):
        x, t = batch(4)
        require_right(penalty, net, x.requires_grad_(), t, scope)
        assert x.grad is not None
    assert len(long_way) == 1


def test_an_input_that_is_written_to_later_takes_the_long_way(long_way):
    """The graph has saved the input of the second layer; a write makes it another."""
    (net, batch), penalty, writes = built("wide"), gpkit.per_sample_grad_norm(0.3), []

    def loss(x, t):
        y = net(x)
        if writes:
            x.mul_(2)
        return F.cross_entropy(y, t, reduction="none")

    for _ in range(2):
        x, t = batch(4)
        penalty.with_loss(lambda x=x, t=t: loss(x, t), net)
    assert len(long_way) == 1
    writes.append(1)
    x, t = batch(4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.with_loss(lambda: loss(x, t), net).backward()


def test_copies_are_others_and_nets_are_not_kept(long_way):
    (net, batch), penalty = built("wide"), gpkit.weight_grad_norm(0.3)
    for _ in range(2):
        require_right(penalty, net, *batch(4), "batch")
    other, twin = copy.deepcopy(penalty), copy.deepcopy(net)
    require_right(other, twin, *batch(4), "batch")
    require_right(penalty, twin, *batch(4), "batch")
    assert len(long_way) == 3
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


@pytest.fixture
def joined(monkeypatch):
    """Return a list with the shapes of the weights whose gradient is one product."""
    shapes, product = [], one_product.product

    def noting(call, *parts):
        shapes.append((*call.layer.weight.shape, sum(part is not None for part in parts)))
        return product(call, *parts)

    monkeypatch.setattr(one_product, "product", noting)
    monkeypatch.setattr(one_product, "LARGE", 1000)
    return shapes


@pytest.mark.parametrize("scope", SCOPES)
def test_the_gradient_in_a_wide_weight_is_one_product(scope, joined, long_way):
    (net, batch), penalty = built("wide"), SCOPES[scope][0](0.3)
    for size in (6, 6, 60):
        require_right(penalty, net, *batch(size), scope)
    assert joined == [(80, 90, 2)]  # not in the first step, and not in a large batch
    assert len(long_way) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_a_backward_pass_by_one_product_runs_again_where_it_may(scope, joined):
    (net, batch), penalty = built("wide"), SCOPES[scope][0](0.3)
    x, t = batch(6)
    require_right(penalty, net, x, t, scope)
    params = list(net.parameters())
    expected = by_hand(net, x, t, scope)[1]
    total = penalty.with_loss(loss_of(net, x, t, scope), net)
    for _ in range(2):
        found = torch.autograd.grad(3 * total, params, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, 3 * other, rtol=1e-9, atol=1e-12)
    assert len(joined) == 2
    torch.autograd.grad(total, params)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(total, params)
    part = penalty.with_loss(loss_of(net, x, t, scope), net)
    (only,) = torch.autograd.grad(part, params[2])
    torch.testing.assert_close(only, expected[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own", ["own", "a bias", "a wide weight"])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_form_is_made_of_has_its_gradient(scope, own, joined, long_way):
    net, batch = built("wide")
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
    assert len(joined) == (0 if own == "a wide weight" else 2)


class Tied(nn.Module):
    """A net that uses the weight of one of its layers once more, elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.head = nn.Linear(5, 90), nn.Linear(90, 90), nn.Linear(90, 3)

    def forward(self, x):
        h = torch.tanh(self.wide(torch.tanh(self.first(x))))
        return self.head(torch.tanh(F.linear(h, self.wide.weight)))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_weight_that_is_used_elsewhere_too_takes_two_products(scope, joined, long_way):
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
    assert (joined, len(long_way)) == ([], 1)


def test_a_hook_of_a_weight_sees_its_gradient(joined):
    (net, batch), penalty, seen = built("wide"), gpkit.per_sample_grad_norm(0.3), []
    x, t = batch(6)
    penalty.with_loss(loss_of(net, x, t, "sample"), net)
    with net[2].weight.register_hook(lambda g: seen.append(g.clone())):
        penalty.with_loss(loss_of(net, x, t, "sample"), net).backward()
    assert len(joined) == 1
    torch.testing.assert_close(seen[-1], by_hand(net, x, t, "sample")[1][2])
