"""The derivative along random directions by forward mode, against double backprop."""

from unittest import mock

import pytest
import torch
from forwards import IMAGES, W, conv, draw, flat, mean_of
from torch import nn

import gpkit
from gpkit.estimators.projection import projection


def test_jvp_of_a_linear_function():
    n2, n4 = float(W.square().sum()), float(W.pow(4).sum())
    for distribution, wanted in (("rademacher", n2**2 - n4), ("gaussian", n2**2)):
        mean, error, variance = mean_of(lambda x: x @ W, gpkit.jvp(1, distribution))
        assert abs(mean - n2) < 4 * error
        assert variance == pytest.approx(2 * wanted, rel=0.05)


MIDDLES = {
    "conv": [],
    "group norm": [nn.GroupNorm(1, 3)],
    "batch norm": [nn.BatchNorm2d(3)],
    "softmax": [nn.Softmax(1)],
    "relu": [nn.ReLU()],
    "pool": [nn.MaxPool2d(1)],
}


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_jvp_is_the_derivative_along_its_direction(middle):
    net, v = conv(*middle), draw(5, 18)
    before = {name: b.clone() for name, b in net.named_buffers()}
    with mock.patch.object(projection, "draw", return_value=[v]):
        value = gpkit.GradientPenalty(estimator=gpkit.jvp())(net, IMAGES)
    for name, b in net.named_buffers():
        torch.testing.assert_close(b, before[name])
    x = IMAGES.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    along = (g.flatten(1) * v).sum(1)
    if isinstance(middle[0] if middle else None, nn.BatchNorm2d):  # samples see each other
        y = net(x)[:, 0]
        rows = [torch.autograd.grad(y[i], x, create_graph=True)[0] for i in range(5)]
        along = torch.stack([(row.flatten() * v.flatten()).sum() for row in rows])
    wanted = along.square().mean()
    torch.testing.assert_close(value, wanted)
    parameters = list(net.parameters())
    found, wanted = (
        flat(
            torch.zeros_like(p) if g is None else g
            for g, p in zip(
                torch.autograd.grad(t, parameters, allow_unused=True), parameters, strict=True
            )
        )
        for t in (value, wanted)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("embed", [8])
def test_jvp_through_attention(embed):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(embed, 2, 16, dropout=0.0, batch_first=True).double()
    f = lambda x: layer(x).flatten(1).sum(1)  # noqa: E731
    x, v = draw(3, 4, embed).requires_grad_(), draw(3, 4 * embed)
    with mock.patch.object(projection, "draw", return_value=[v]):
        value = gpkit.GradientPenalty(estimator=gpkit.jvp())(f, x)
    (g,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(value, (g.flatten(1) * v).sum(1).square().mean().detach())
    value.backward()
    assert all(p.grad is not None for p in layer.parameters() if p.ndim > 1)


class Backward(nn.Module):
    """Tanh with a backward formula alone."""

    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.tanh(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g * (1 - y * y)

    def forward(self, x):
        return self.Tanh.apply(x)


def test_jvp_needs_forward_mode():
    with pytest.raises(RuntimeError, match=r"forward-mode derivative of every operation.*exact"):
        gpkit.GradientPenalty(estimator="jvp")(conv(Backward()), IMAGES)
