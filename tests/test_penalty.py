"""GradientPenalty: the promised calls, known answers, and what is averaged before the norm."""

import math
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from compare import gradients, relative_error
from scenes import B
from small import data, mlp
from torch import nn

import gpkit


def backward(value, net):
    """Return the gradients that a training step would see."""
    net.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_weight_penalty_in_a_training_loop():
    net, x, y = mlp(3), data(), torch.arange(B) % 3
    penalty = gpkit.weight_grad_norm(weight=0.1)
    loss = F.cross_entropy(net(x), y)
    total = loss + penalty(loss, net.parameters())
    found = backward(total, net)

    def closure():
        return F.cross_entropy(net(x), y)

    again = backward(closure() + penalty(closure, net), net)

    def true(params):
        def risk(p):
            return F.cross_entropy(torch.func.functional_call(net, p, (x,)), y)

        return risk(params) + 0.1 * oracles.weight_norm(risk, params).square().sum()

    grads, value = torch.func.grad_and_value(true)(dict(net.named_parameters()))
    true = torch.cat([g.flatten() for g in grads.values()])
    assert relative_error(total, value) < 1e-12
    assert relative_error(found, true) < 1e-12
    assert relative_error(again, true) < 1e-12


def test_input_penalty_in_a_training_loop():
    net, x, y = mlp(3), data(), torch.arange(B) % 3
    penalty = gpkit.input_grad_norm(weight=1.0)
    x.requires_grad_(True)
    losses = F.cross_entropy(net(x), y, reduction="none")
    (losses.mean() + penalty(losses, x)).backward()

    def true(params):
        def risk(x, y):
            output = torch.func.functional_call(net, params, (x[None],))
            return F.cross_entropy(output, y[None])

        risks = torch.func.vmap(risk)(x.detach(), y)
        return risks.mean() + oracles.input_norms(risk, 1, x.detach(), y).square().mean()

    grads = torch.func.grad(true)(dict(net.named_parameters()))
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


def test_critic_calls():
    # D(x) = a‖x‖²/2, whose slope is ax: catches real and fake exchanged, and a factor of a half
    a = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    real, fake = data(), 3 * data()
    sizes = [1.5 * x.norm(dim=1) for x in (real, fake)]

    def critic(x):
        return a * x.square().sum(1) / 2

    close = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    close(gpkit.r1(weight=10.0)(critic, real=real), 5 * sizes[0].square().mean())
    close(gpkit.r2(weight=10.0)(critic, fake=fake), 5 * sizes[1].square().mean())
    close(gpkit.input_grad_norm(weight=1.0)(critic, real), sizes[0].square().mean())
    penalty = gpkit.wgan_gp(weight=10.0)
    close(penalty(critic, real=real, fake=real), 10 * (sizes[0] - 1).square().mean())
    terms = penalty.terms(critic, real=real, fake=-real)  # at (2α - 1) x: slopes of |2α - 1| ax
    share = terms.norms / sizes[0]
    assert ((share > 0) & (share < 1)).all()
    assert len(share.unique()) == B
    close(terms.values, (terms.norms - 1).square())
    close(terms.penalty, 10 * terms.values.mean())
    (slope,) = torch.autograd.grad(terms.penalty, a)
    close(slope, (20 * (terms.norms - 1) * terms.norms / 1.5).mean().detach())


@pytest.mark.filterwarnings("ignore:.*random estimate of n²")
def test_all_axes_together():
    # D(x) = Σ aᵢ xᵢ² / 2 has the Hessian diag(a), of which a projection on signs loses nothing
    a = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    penalty = gpkit.GradientPenalty(
        of="output", wrt="input", order=2, form=gpkit.two_sided(1.0), at=gpkit.interpolate(),
        estimator=gpkit.projection(4), weight=10.0, every=16,
    )  # fmt: skip

    def critic(x):
        return x.square() @ a / 2

    value = penalty(critic, real=data(), fake=data())
    n = a.norm()
    torch.testing.assert_close(value, 16 * 10 * (n - 1).square())
    (slope,) = torch.autograd.grad(value, a)
    torch.testing.assert_close(slope, (16 * 20 * (n - 1) * a / n).detach())
    assert [penalty(critic, real=data(), fake=data()).item() for _ in range(15)] == [0.0] * 15
    assert penalty(critic, real=data(), fake=data()) == value


def test_linear_map():
    A = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = gpkit.jacobian(weight=1.0, estimator="exact")(lambda x: x @ A.T + 1, data())
    torch.testing.assert_close(value, A.square().sum() / 2)
    torch.testing.assert_close(torch.autograd.grad(value, A)[0], A.detach())


def test_linear_regression():
    A, t = data(), data(1).squeeze(1)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value = gpkit.weight_grad_norm(weight=1.0)(lambda: (A @ w - t).square() / 2, [w])
    norm, gradient = oracles.regression(A, t, w.detach())
    torch.testing.assert_close(value, norm)
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], gradient)


def test_one_hidden_relu_layer_is_not_trained_through_itself():
    # f = w₂ᵀ relu(W₁x): ∂f/∂W₁ does not depend on W₁; catches a stale .grad and a wrong graph
    net = mlp(act=nn.ReLU)
    net(data()).sum().backward()
    stale = net[0].weight.grad.clone()
    penalty = gpkit.weight_grad_norm(weight=1.0, match="0.weight")
    x = data()
    value = penalty(lambda: net(x).mean(), net)
    w1, w2 = torch.autograd.grad(value, [net[0].weight, net[2].weight], materialize_grads=True)
    assert torch.equal(w1, torch.zeros_like(w1))
    assert w2.any()
    assert torch.equal(net[0].weight.grad, stale)


@pytest.mark.parametrize(("gamma", "distance"), [(0.0, 3.10), (0.3, 2.6e-6), (1.0, 9.5e-22)])
def test_dirac_gan(gamma, distance):
    # D(x) = ψx, real at 0, fake at θ: without a penalty simultaneous descent leaves (0, 0)
    theta, psi = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    penalty, real = gpkit.r1(weight=gamma), torch.zeros(1, dtype=torch.float64)

    def critic(x):
        return psi * x

    for _ in range(500):
        loss = F.softplus(-psi * theta)  # the critic's; the generator's is its negative
        regular = loss + penalty(critic, real=real)
        (down,) = torch.autograd.grad(regular, psi, retain_graph=True)
        (up,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            psi -= 0.2 * down
            theta += 0.2 * up
    assert math.hypot(psi.item(), theta.item()) == pytest.approx(distance, rel=0.02)


def test_scopes():
    # catches a scope that is ignored: mean ‖g_i‖² is not ‖mean g_i‖²
    net, x = mlp(), data()
    batch = gpkit.weight_grad_norm(weight=1.0)
    sample = gpkit.weight_grad_norm(weight=1.0, scope="sample")
    each = [batch(net(x[i : i + 1]).square(), net) for i in range(B)]
    assert relative_error(sample(net(x).square(), net), sum(each) / B) < 1e-12
    assert batch(net(x).square(), net) < 0.99 * sample(net(x).square(), net)
    mean = batch(net(x).square().mean(), net)
    assert relative_error(batch(net(x).square(), net), mean) < 1e-12


def test_weight_of_several_outputs_is_the_jacobian():
    net, x = mlp(2), data()
    value = gpkit.weight_grad_norm(weight=1.0, of="output")(net(x), net)
    parts = [gpkit.weight_grad_norm(weight=1.0)(net(x)[:, i].mean(), net) for i in range(2)]
    assert relative_error(value, sum(parts)) < 1e-12


def test_selected_output():
    net, x = mlp(2), data()
    penalty = gpkit.r1(weight=1.0, of=lambda out: out["logits"][:, 0])
    value = penalty(lambda x: {"logits": net(x)}, real=x)
    assert relative_error(value, gpkit.r1(weight=1.0)(lambda x: net(x)[:, 0], real=x)) < 1e-12


def test_several_inputs_have_one_norm():
    net, x = mlp(), data()
    a, b = x[:, :1].clone(), x[:, 1:].clone()
    whole = gpkit.eikonal(weight=1.0)(net, x)
    parts = gpkit.eikonal(weight=1.0)(lambda a, b: net(torch.cat([a, b], 1)), (a, b))
    assert relative_error(parts, whole) < 1e-12
    a.requires_grad_(), b.requires_grad_()
    graph = gpkit.eikonal(weight=1.0)(net(torch.cat([a, b], 1)), (a, b))
    assert relative_error(graph, whole) < 1e-12


def test_terms_can_be_trained_on():
    net, x = mlp(), data()
    terms = gpkit.eikonal(weight=2.0).terms(net, x)
    custom = 2.0 * (terms.norms - 1).square().mean()
    true = gpkit.eikonal(weight=2.0)(net, x)
    assert relative_error(gradients(custom, net), gradients(true, net)) < 1e-12


def test_frozen_parameters_take_no_part():
    net, x = mlp(), data()
    net[0].requires_grad_(False)
    value = gpkit.weight_grad_norm(weight=1.0)(net(x).square().mean(), net)
    part = gpkit.weight_grad_norm(weight=1.0, match="2.*")(net(x).square().mean(), net)
    assert relative_error(value, part) < 1e-12


def test_nan_is_not_masked():
    net, x = mlp(), data()
    x[0, 0] = math.nan
    for penalty in (gpkit.r1(), gpkit.eikonal(), gpkit.wgan_lp(at="data")):
        assert penalty(net, x).isnan()
        assert penalty.terms(net, x).norms.isnan().tolist() == [True, *[False] * (B - 1)]


def test_repr_names_the_axes():
    said = repr(gpkit.wgan_gp(weight=3.0, every=4))
    for part in (
        "two_sided(norm='l2', scale=1.0, eps=0.0, center=1.0)",
        "interpolate",
        "weight=3.0",
    ):
        assert part in said
