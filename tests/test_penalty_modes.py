"""A penalty where a net has modes and kernels: autocast, dropout, attention, checkpoints."""

from functools import partial

import pytest
import torch
from compare import gradients, relative_error
from nets import Cube
from scenes import images
from small import data, mlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import gpkit
from gpkit.needs import needs_of


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_a_value(mode):
    net, x = mlp(), data()
    training = gpkit.r1()(net, real=x)
    with mode():
        inside = data()
        value = gpkit.r1()(net, real=x)
        terms = gpkit.r1().terms(net, real=x)
        gpkit.r1()(net, real=inside)
        loss = gpkit.weight_grad_norm()(lambda: net(x).square().mean(), net)
    assert relative_error(value, training) < 1e-12
    tensors = value, terms.norms, terms.values, terms.penalty, loss
    assert not any(t.requires_grad for t in tensors)
    assert all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("kind", ["input", "weight"])
@pytest.mark.parametrize("route", ["graph", "callable"])
def test_autocast(kind, route):
    def penalty(net, x):
        if kind == "weight":
            loss = net(x).square().mean() if route == "graph" else lambda: net(x).square().mean()
            return gpkit.weight_grad_norm(weight=1.0)(loss, net)
        z = x.clone().requires_grad_()
        return gpkit.r1(weight=1.0)(net(z).float() if route == "graph" else net, real=z)

    net, x = mlp().float(), data().float()
    true = penalty(net, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty(net, x)
    assert value.dtype == torch.float32
    assert relative_error(value, true) < 0.05
    assert relative_error(gradients(value, net), gradients(true, net)) < 0.05


def test_autocast_does_not_round_the_backward_of_a_graph_in_float32():
    net, z = mlp().float(), data().float().requires_grad_()
    penalties = gpkit.r1(), gpkit.curvature()
    true = [penalty(net(z), z) for penalty in penalties]
    scores = net(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [penalty(scores, z) for penalty in penalties]
    torch.testing.assert_close(inside, true, rtol=1e-6, atol=0)


def test_dropout_draws_from_a_stream_of_its_own():
    net, x = mlp(p=0.5), data()
    state = torch.get_rng_state()
    penalty = gpkit.r1(seed=1)
    first, second = penalty(net, real=x), penalty(net, real=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert first != second  # a mask of its own at each call
    torch.manual_seed(77)
    assert gpkit.r1(seed=1)(net, real=x) == first  # which the training's numbers do not touch
    torch.manual_seed(0)
    assert gpkit.r1()(net, real=x) != first  # another seed


def test_batch_norm_statistics_move_once_a_step():
    # the training forward moves them; a penalty's own forward does not
    nets = [images(stateful=True).net for _ in range(2)]
    x = images().real
    penalty = gpkit.r1()
    for net, act in zip(nets, (True, False), strict=True):
        net.train()
        loss = net(x).mean()
        if act:
            ways = [net, net.forward, partial(net), lambda x, critic=net: critic(x)]
            loss = loss + sum(penalty(f, real=x) for f in ways)
        loss.backward()
    assert nets[0][1].num_batches_tracked == 1
    assert all(map(torch.equal, nets[0].buffers(), nets[1].buffers()))


def test_buffers_are_given_back_after_an_error():
    net = images(stateful=True).net
    before = [id(b) for b in net.buffers()]
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        gpkit.r1()(lambda x: net(x) * (1 / 0), real=images().real)
    assert [id(b) for b in net.buffers()] == before
    assert net[1].num_batches_tracked == 0


def test_randomness_is_a_function_of_seed_and_count():
    net, x = mlp(10), data()
    one, two, other = (gpkit.jacobian(seed=seed) for seed in (3, 3, 4))
    draws = [penalty(net, x).item() for penalty in (one, two, other) for _ in range(3)]
    assert draws[:3] == draws[3:6]
    assert len(set(draws)) == 6


def encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True, **kwargs)
    return layer.double().eval()


def attention():
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    return lambda x: layer(x, x, x, need_weights=False)[0], layer


@pytest.mark.parametrize("kind", ["encoder", "attention"])
def test_attention_has_a_double_backward_by_itself(kind):
    f, layer = (encoder(),) * 2 if kind == "encoder" else attention()
    x = data(3, 4)

    def score(x):
        return f(x).square().sum((1, 2))

    value = gpkit.r1()(score, real=x)
    with sdpa_kernel(SDPBackend.MATH):
        z = x.clone().requires_grad_()
        true = gpkit.r1()(score(z), z)
    assert relative_error(value, true) < 1e-10
    assert relative_error(gradients(value, layer), gradients(true, layer)) < 1e-10
    z = x.clone().requires_grad_()
    for graph in (lambda: gpkit.r1()(score(z), z), lambda: gpkit.curvature()(score(z), z)):
        with pytest.raises(
            RuntimeError, match=r"sdpa_kernel\(SDPBackend.MATH\), or give .* a call"
        ):
            graph()


def test_attention_upstream_of_the_variables_is_no_obstacle():
    f, _ = attention()
    head, x = nn.Linear(4, 1).double(), data(3, 4)
    loss = head(f(x)).square().mean()
    value = gpkit.weight_grad_norm(weight=1.0)(loss, head)
    value.backward()
    assert head.weight.grad.any()


def test_checkpointing():
    net, x = mlp(), data()
    z = x.clone().requires_grad_()

    def run(z, reentrant):
        return checkpoint(net, z, use_reentrant=reentrant)

    value = gpkit.r1()(lambda x: run(x, False), real=x)
    true = gpkit.r1()(net, real=x)
    assert relative_error(value, true) < 1e-12
    assert relative_error(gradients(value, net), gradients(true, net)) < 1e-12
    for act in (
        lambda: gpkit.r1()(lambda x: run(x, True), real=x),
        lambda: gpkit.weight_grad_norm()(run(z, True).square().mean(), net.parameters()),
    ):
        with pytest.raises(RuntimeError, match=r"use checkpoint\(..., use_reentrant=False\)"):
            act()


@pytest.mark.parametrize("order", [1, 2])
def test_once_differentiable_function(order):
    # torch takes such a backward for a constant, without a word, where it comes last
    net = mlp()
    with pytest.raises(
        RuntimeError, match=r"CubeBackward: .* write its backward in differentiable"
    ):
        gpkit.curvature(order=order)(lambda x: Cube.apply(net(x)), data())
    h = Cube.apply(net[:2](data()))  # upstream of the variables it does no harm
    gpkit.curvature(order=order)(net[2](h).tanh(), h).backward()


def test_needs_are_worked_out_again_where_a_choice_was_replaced():
    penalty = gpkit.weight_grad_norm()
    needs = needs_of(penalty)
    assert needs_of(penalty) is needs
    penalty.estimator = gpkit.finite_difference()
    assert needs_of(penalty).loss_at_two_points
    penalty.weight = gpkit.gradient_share(0.1)
    assert needs_of(penalty).measures
