"""Norms of each sample's gradient in the weights: equal to a loop over the samples, at one pass."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import gpkit
from gpkit.autodiff.layers.gram import gram_product, rows_norm

B = 5


class Tied(nn.Module):
    """An embedding whose weight is the head's as well, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.twice = nn.Linear(4, 4)

    def forward(self, tokens):
        return self.head(torch.tanh(self.twice(self.twice(self.embed(tokens))))).mean(1)


class Attention(nn.Module):
    """Self-attention written out, with a residual."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.norm(self.embed(tokens))
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.out(h + (q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1)


class Bare(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(x * self.scale)


class UsedTwice(nn.Module):
    """A layer whose weight is used outside of its call as well."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        return F.linear(self.first(x).tanh(), self.first.weight)


def pooled(*layers, dim):
    return nn.Sequential(
        *layers, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[dim - 1](1), nn.Flatten()
    )


def x(*shape):
    return torch.randn(B, *shape, dtype=torch.float64)


def tokens():
    return torch.randint(0, 7, (B, 6))


RIGHT = {
    "linear, in place": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3, bias=False)),
        x(4),
    ),
    "positions, Gram": lambda: (
        nn.Sequential(nn.Linear(9, 9), nn.RMSNorm(9), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)),
        x(2, 9),
    ),
    "positions, gradients": lambda: (
        nn.Sequential(
            nn.Linear(2, 3), nn.Tanh(), nn.LayerNorm([8, 3]), nn.Flatten(), nn.Linear(24, 3)
        ),
        x(8, 2),
    ),
    "conv": lambda: (
        pooled(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.Conv2d(4, 6, 3, padding=1, groups=2),
            nn.InstanceNorm2d(6, affine=True),
            nn.Tanh(),
            nn.Conv2d(6, 3, 2, bias=False),
            dim=2,
        ),
        x(2, 7, 7),
    ),
    "wide conv, Gram": lambda: (
        nn.Sequential(nn.Conv2d(9, 9, 3, padding=1), nn.SiLU(), nn.Conv2d(9, 3, 3), nn.Flatten()),
        x(9, 3, 3),
    ),
    "conv 1-D": lambda: (
        pooled(nn.Conv1d(2, 4, 3, dilation=2), nn.SiLU(), nn.Conv1d(4, 3, 3), dim=1),
        x(2, 11),
    ),
    "conv 3-D": lambda: (
        nn.Sequential(nn.Conv3d(1, 3, 2), nn.Tanh(), nn.Conv3d(3, 3, 2), nn.Flatten()),
        x(1, 3, 3, 3),
    ),
    "batch norm in eval mode": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).eval(),
        x(4),
    ),
    "tied weights, reused layer": lambda: (Tied(), tokens()),
    "attention": lambda: (Attention(), tokens()),
}

LOOPED = {
    "LSTM": lambda: (nn.LSTM(3, 3), x(4, 3), "LSTM"),
    "attention module": lambda: (
        nn.MultiheadAttention(4, 2, batch_first=True),
        x(3, 4),
        "Multihead",
    ),
    "bare parameter": lambda: (Bare(), x(3), "Bare"),
    "weight used elsewhere": lambda: (UsedTwice(), x(3), r"\[3, 3\] is used outside"),
    "batch norm": lambda: (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), x(3), "BatchNorm1d"),
    "transposed conv": lambda: (nn.ConvTranspose1d(2, 3, 3), x(2, 4), "ConvTranspose1d"),
    "coupled samples": lambda: (Coupled(), x(3), "depend on each other"),
    "rows that are no samples": lambda: (Flat(), x(4, 3), r"\[20, 3\], has no row"),
}


class Coupled(nn.Sequential):
    """Each sample is compared with the mean of the batch."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3))

    def forward(self, x):
        h = self[0](x)
        return (h - h.mean(0)) ** 2


class Flat(Coupled):
    """The first dimension within the net is not the batch."""

    def forward(self, x):
        return self[0](x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def losses(net, x, y):
    if isinstance(net, nn.MultiheadAttention):
        return net(x, x, x)[0].flatten(1).square().sum(1)
    output = net(x)[0] if isinstance(net, nn.LSTM) else net(x)
    output = output.flatten(1)
    return F.cross_entropy(output, y % output.shape[1], reduction="none")


def by_hand(net, x, y):
    """Return the squared norm of each sample's gradient, by a loop, ``[B]``."""
    ps = [p for p in net.parameters() if p.requires_grad]

    def squared(loss):
        grads = torch.autograd.grad(loss, ps, create_graph=True, allow_unused=True)
        return sum(g.square().sum() for g in grads if g is not None)

    return torch.stack([squared(loss) for loss in losses(net, x, y)])


def compare(net, x, y, penalty):
    """Compare the values, and the gradient of a penalty with other weights for each sample."""
    ps = [p for p in net.parameters() if p.requires_grad]
    factors = torch.arange(1.0, B + 1, dtype=torch.float64)
    n2 = penalty.terms(lambda: losses(net, x, y), net).squared_norms
    truth = by_hand(net, x, y)
    torch.testing.assert_close(n2, truth, rtol=1e-10, atol=1e-14)
    got, want = (
        torch.autograd.grad(v @ factors, ps, allow_unused=True, materialize_grads=True)
        for v in (n2, truth)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", RIGHT)
def test_norms_of_each_sample_equal_a_loop_over_the_samples(kind):
    torch.manual_seed(0)
    net, x = RIGHT[kind]()
    compare(net.double(), x, torch.arange(B), gpkit.per_sample_grad_norm())


@pytest.mark.parametrize("kind", RIGHT)
def test_they_take_one_gradient_of_the_forward_pass(kind, monkeypatch):
    torch.manual_seed(0)
    net, x = RIGHT[kind]()
    net.double()
    penalty = gpkit.per_sample_grad_norm()
    penalty.shortcuts.note = lambda *given: given[-1]  # which compares a chain with autograd
    penalty(lambda: losses(net, x, torch.arange(B)), net)  # the first call compares two samples
    grad, calls = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    penalty(lambda: losses(net, x, torch.arange(B)), net)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", LOOPED)
def test_other_nets_take_a_loop_and_say_why_once(kind):
    torch.manual_seed(0)
    net, x, why = LOOPED[kind]()
    penalty = gpkit.per_sample_grad_norm()
    with pytest.warns(UserWarning, match=why):
        compare(net.double(), x, torch.arange(B), penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(lambda: losses(net, x, torch.arange(B)), net)


def test_a_frozen_layer_and_a_pattern_of_names_leave_parameters_out():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    data, y = x(4), torch.arange(B)
    net[2].requires_grad_(False)
    compare(net, data, y, gpkit.per_sample_grad_norm())
    head = gpkit.per_sample_grad_norm(wrt=gpkit.weights("4.*"))
    n2 = head.terms(lambda: losses(net, data, y), net).squared_norms
    torch.testing.assert_close(n2, by_hand(net[4], net[:4](data).detach(), y))


def test_an_input_that_was_modified_in_place_is_not_used():
    torch.manual_seed(0)
    first = nn.Linear(3, 3).double()

    def closure():
        data = x(3)
        out = first(data)
        data.zero_()  # the layer saved it for the gradient of its weight
        return out.square().sum(1)

    with (
        pytest.warns(UserWarning, match="modified in place"),
        pytest.raises(RuntimeError, match="modified in place"),
    ):
        gpkit.per_sample_grad_norm()(closure, first)


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
def test_half_precision_autocast_gives_norms_in_float32(dimensions):
    """Of convolutions too, for which a CPU has no kernel in bfloat16 with samples as groups."""
    torch.manual_seed(0)
    y = torch.arange(B)
    if dimensions:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        first = (kind(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten())
        net, data = nn.Sequential(*first, nn.Linear(3 * 3**dimensions, 3)), x(2, *[3] * dimensions)
    else:
        net, data = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), x(4)
    data = data.float()
    with torch.autocast("cpu", torch.bfloat16):
        n2 = gpkit.per_sample_grad_norm().terms(lambda: losses(net, data, y), net).squared_norms
    assert n2.dtype == torch.float32
    torch.testing.assert_close(n2, by_hand(net, data, y), rtol=0.05, atol=0.0)


def test_gram_product_has_a_third_derivative():
    torch.manual_seed(0)
    left, right = (torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (2, 4))
    torch.testing.assert_close(
        gram_product(left, right), (left.transpose(1, 2) @ right).flatten(1).square().sum(1)
    )
    assert gradgradcheck(gram_product, (left, right))


def test_rows_norm_has_a_third_derivative():
    torch.manual_seed(0)
    d, a, e = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (2, 4, 5))
    given = torch.randn(3, 2, dtype=torch.float64)  # an input of a net, without a gradient

    def norm(d, a, e):  # d and a are in several terms, and the first of them in a weight and a bias
        return rows_norm([(d, a), (d, None), (e, given), (a, e)])

    def by_hand(d, a, e):
        length = lambda rows: (rows**2).sum(1)  # noqa: E731
        own = length(d) * (length(a) + 1)
        return own + length(e) * length(given) + length(a) * length(e)

    torch.testing.assert_close(norm(d, a, e), by_hand(d, a, e))
    assert gradcheck(norm, (d, a, e))
    assert gradgradcheck(norm, (d, a, e))
    share = torch.randn(3, dtype=torch.float64)
    found, expected = (torch.autograd.grad(f(d, a, e), (d, a, e), share) for f in (norm, by_hand))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_norm_is_wide_in_half_precision():
    rows = torch.full((2, 300), 0.1, dtype=torch.bfloat16, requires_grad=True)
    n2 = rows_norm([(rows, rows)])
    assert n2.dtype == torch.float32
    torch.testing.assert_close(n2, (rows.double() ** 2).sum(1).square().float())
    n2.sum().backward()
    assert rows.grad.dtype == torch.bfloat16
