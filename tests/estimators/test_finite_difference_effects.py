"""Finite differences take first derivatives alone, and leave a net as it was."""

import copy
from functools import partial

import pytest
import torch
from compare import gradients, relative_error
from differenced import data, fd, kinds, mlp, penalise, sides
from nets import Cube
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkit
from gpkit.estimators.curvature_difference import curvature_difference
from gpkit.estimators.differences.moves import perturbed


def test_weights_are_given_back_bit_for_bit():
    # subtracting the step again would leave a rounding error
    net, x = mlp(dtype=torch.float32), data(torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    loss = net(x).square().mean()  # a graph that has saved the weights
    total = loss + penalise("weight", net, x, fd(0.3, "central"))
    assert all(map(torch.equal, before, net.parameters()))
    total.backward()  # catches a version that has moved


def test_weights_are_given_back_when_the_closure_raises():
    net, x, calls = mlp(), data(), []
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        calls.append(net[0].weight.detach().clone())
        if len(calls) == 3:  # the second is at the same weights: does it repeat the first?
            raise KeyboardInterrupt
        return net(x).square().mean()

    with pytest.raises(KeyboardInterrupt):
        gpkit.weight_grad_norm(estimator="finite_difference")(closure, net)
    assert not torch.equal(calls[0], calls[2])
    assert all(map(torch.equal, before, net.parameters()))
    with (
        pytest.raises(RuntimeError),
        perturbed([before[0]], [torch.zeros(2, 2)]),
    ):  # cannot be added
        pass


@kinds
@sides
def test_no_side_effects(kind, side):
    net, x = mlp(nn.BatchNorm1d(6), nn.Dropout(0.3)), data()
    net[0].bias.requires_grad_(False)
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    before = copy.deepcopy((net.state_dict(), x)), torch.get_rng_state()
    penalise(kind, net, x, fd(None, side))
    torch.testing.assert_close(
        ((net.state_dict(), x), torch.get_rng_state()), before, rtol=0, atol=0
    )
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["0.weight"]
    assert (net[0].weight.grad == 7).all()
    assert not net[0].bias.requires_grad
    assert not x.requires_grad


@kinds
def test_points_share_a_dropout_mask(kind):
    # with masks of their own the difference would be of order 1/h
    net, x = mlp(nn.Dropout(0.5)), data()
    pair = [
        gradients(penalise(kind, net, x, e, seed=3), net) for e in ("exact", fd(1e-5, "central"))
    ]
    assert relative_error(pair[1], pair[0]) < 1e-6


@kinds
def test_once_differentiable_function(kind):
    net, x = mlp(), data()
    exact = gradients(penalise(kind, nn.Sequential(net, Power()), x, "exact"), net)
    once = nn.Sequential(net, Power(Cube.apply))
    assert (
        relative_error(gradients(penalise(kind, once, x, fd(1e-5, "central")), net), exact) < 1e-6
    )


class Power(nn.Module):
    def __init__(self, function=lambda x: x**3):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 12)
        self.fused = True

    def forward(self, x):
        q, k, v = self.mix(x[:, None, None, :] * torch.arange(1, 5).to(x)[:, None]).chunk(3, -1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if self.fused else SDPBackend.MATH):
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.flatten(1).sum(1, keepdim=True)


@kinds
def test_fused_attention(kind):
    net, x = Attention().double(), data()
    found = gradients(penalise(kind, net, x, fd(1e-5, "central")), net)
    with pytest.raises(RuntimeError, match="fused attention has no double backward"):
        penalise(kind, net, x, "exact")
    net.fused = False
    assert relative_error(found, gradients(penalise(kind, net, x, "exact"), net)) < 1e-6


@pytest.mark.compiler
@kinds
@functorch_config.patch(donated_buffer=False)  # as the error says; once inductor is there
def test_compiled_net(kind):
    # catches a trace that takes in the hooks of the isolation, and is made anew at every call
    torch.compiler.reset()  # shapes that other tests compiled would make these dynamic
    net, x, graphs = mlp(*[nn.BatchNorm1d(6)] * (kind == "weight")), data(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(net, backend=backend)
    exact = gradients(penalise(kind, net, x, "exact"), net)
    before = copy.deepcopy(net.state_dict())
    for _ in range(6):
        found = gradients(penalise(kind, compiled, x, fd(1e-5, "central")), net)
        assert relative_error(found, exact) < 1e-6
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert len(graphs) <= 2


def call(**axes):
    return partial(gpkit.GradientPenalty, **axes)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (call(estimator=fd(), order=2), r"takes order=1; got order=2: use estimator='projection'"),
        (call(estimator="cure"), "must be one of 'exact', 'projection', 'finite_difference'"),
        (lambda: fd(0.0), r"`finite_difference\(step=...\)` must be a number > 0; got 0.0"),
        (lambda: fd(side="centre"), r"got 'centre' \(did you mean 'central'\?\)"),
        (lambda: curvature_difference(-1), "must be a number > 0; got -1"),
        (call(estimator=curvature_difference(), wrt="weight"), "needs wrt='input'"),
        (
            lambda: gpkit.cure()(torch.zeros(5, requires_grad=True), torch.zeros(5, 1)),
            "the samples do not require grad",
        ),
        (
            lambda: gpkit.GradientPenalty(estimator=fd())(lambda x: x * 2, data()),
            "takes one output per group; got 3: use estimator='projection' or 'exact'",
        ),
    ],
)
def test_refuses(act, said):
    with pytest.raises(ValueError, match=said):
        act()


def test_refuses_a_graph_without_the_function():
    net, x = mlp(), data().requires_grad_()
    y = net(x)
    with pytest.raises(ValueError, match=r"needs a callable.* got a tensor: use penalty\(f, x\)"):
        gpkit.input_grad_norm(estimator=fd())(y, x)
    with pytest.raises(ValueError, match=r"penalty\(closure, net\), or estimator='exact'"):
        gpkit.gnp()(y.mean(), net)
    loss = y.mean()
    with pytest.raises(RuntimeError, match="the closure returned the same tensor twice"):
        gpkit.gnp()(lambda: loss, net)
    with pytest.raises(TypeError, match="is for weight penalties"):
        gpkit.input_grad_norm().with_loss(lambda: loss, net)
    with pytest.raises(TypeError, match="takes a function that returns the loss; got a Tensor"):
        gpkit.gnp().with_loss(loss, net)
    moved = [p * 1 for p in net.parameters()]
    with pytest.raises(ValueError, match="one of them is not a leaf tensor: give"):
        gpkit.gnp()(lambda: moved[0].square().sum(), moved)


@kinds
def test_refuses_what_trains_nothing(kind):
    net, other, x = mlp(), mlp(), data()
    penalty = gpkit.GradientPenalty(wrt=kind, estimator=fd())
    args = (lambda z: net(x) + 0 * z.detach().sum(), x)
    if kind == "weight":
        args = (lambda: net(x).mean(), other)
    with pytest.raises(RuntimeError, match=f"does not depend on the {kind}s"):
        penalty(*args)
