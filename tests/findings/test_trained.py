"""Each net that a penalty meets is looked at: does the penalty train it, and is it right?"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.estimators.base import Target

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def mlp(*layers, out=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(layers or [nn.Tanh()]), nn.Linear(8, out))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Cube(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ENTRIES = {
    "callable": lambda penalty, net: penalty(net, real=X),
    "lambda": lambda penalty, net: penalty(lambda z: net(z), real=X),
    "tensor": lambda penalty, net: penalty(net(leaf := X.clone().requires_grad_()), leaf),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_second_net_of_one_penalty_is_looked_at(entry):
    penalty = gpkit.r1()
    for _ in range(2):
        ENTRIES[entry](penalty, mlp())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        ENTRIES[entry](penalty, mlp(nn.Tanh(), Cube()))


def test_a_second_net_in_the_weights_and_at_order_2():
    penalty = gpkit.weight_grad_norm()
    net, other = mlp(), mlp(nn.Tanh(), Cube())
    penalty(net(X).square().mean(), net)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty(other(X).square().mean(), other)
    penalty = gpkit.curvature()
    x = X.clone().requires_grad_()
    penalty(mlp()(x), x)
    with pytest.raises(RuntimeError, match="layer norm"):
        penalty(mlp(nn.Tanh(), nn.LayerNorm(8))(x), x)
    with pytest.raises(RuntimeError, match="piecewise-linear"):
        penalty(mlp(nn.ReLU()), x)


def test_a_known_net_is_not_looked_at_again():
    net, penalty = mlp(), gpkit.r1()
    x = X.clone().requires_grad_()
    penalty(net(x), x)
    again = X.clone().requires_grad_()
    assert Target(net(again), (again,), True) in penalty.seen
    assert Target(mlp()(again), (again,), True) not in penalty.seen
    net[0].weight.requires_grad_(False)
    # other parameters are trained
    assert Target(net(again), (again,), True) not in penalty.seen
    assert not copy.deepcopy(penalty).seen


def test_a_known_net_is_looked_at_again_for_another_derivative():
    x = X.clone().requires_grad_()
    net, penalty = mlp(nn.Tanh(), nn.LayerNorm(8)), gpkit.r1()
    penalty(net(x), x)
    penalty.order = 2
    with pytest.raises(RuntimeError, match="layer norm"):
        penalty(net(x), x)
    net, penalty = mlp(nn.LeakyReLU()), gpkit.r1()
    penalty(net, real=X)
    penalty.order = 2
    with pytest.raises(RuntimeError, match="piecewise-linear"):
        penalty(net, real=X)
    penalty.order = 1
    assert penalty(net, real=X).requires_grad


@pytest.mark.parametrize("freeze_later", [False, True])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda z: net(z)])
def test_a_frozen_critic_is_refused(freeze_later, wrap):
    net, penalty = mlp(), gpkit.wgan_gp()
    if freeze_later:
        penalty(wrap(net), real=X, fake=-X)
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"all parameters of the net are frozen: call net\.req"):
        penalty(wrap(net), real=X, fake=-X)
    with torch.no_grad():
        assert penalty(wrap(net), real=X, fake=-X) > 0
    net.requires_grad_(True)
    assert penalty(wrap(net), real=X, fake=-X).requires_grad


def test_a_function_without_parameters_has_a_value():
    assert gpkit.r1(weight=2.0)(lambda x: 3 * x[:, 0], real=X) == 9.0


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LeakyReLU(), nn.Hardtanh(), nn.PReLU()])
@pytest.mark.parametrize("calls", [1, 2])
def test_derivatives_of_a_piecewise_linear_net_in_an_expression(layer, calls):
    # u_xx of such a net is zero, and so is the gradient of u_t - u_xx
    def residual(net):
        def f(z):
            z = z if z.requires_grad else z.requires_grad_()
            (g,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
            (second,) = torch.autograd.grad(g[:, 0].sum(), z, create_graph=True)
            return g[:, 1] - second[:, 0]

        return f

    penalty = gpkit.input_grad_norm()
    for _ in range(calls - 1):
        penalty(residual(mlp()), X)
    with pytest.raises(RuntimeError, match="derivatives of a piecewise-linear net"):
        penalty(residual(mlp(layer)), X)


def test_batch_norm_in_training_mode_is_said_once_with_what_helps():
    net, penalty = mlp(nn.BatchNorm1d(8), nn.Tanh()), gpkit.r1()
    with pytest.warns(UserWarning, match='batch norm is in training mode.*forward="eval"'):
        penalty(net, real=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(net, real=X)
        gpkit.r1(forward="eval")(net, real=X)  # the advice
        gpkit.r1()(net.eval(), real=X)
        gpkit.r1()(mlp(nn.GroupNorm(2, 8), nn.Tanh()), real=X)


def test_layers_that_compare_samples_are_found_in_a_graph_too():
    net = mlp(Call(lambda h: h - h.mean(0)), nn.Tanh())
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match=r"depend on each other \(does a layer compare samples"):
        gpkit.jacobian()(net(x), x)


@pytest.mark.parametrize("preset", [gpkit.r1, gpkit.wgan_gp])
def test_batch_norm_before_the_last_layer_trains_nothing(preset):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    given = {"real": X.double(), **({"fake": -X.double()} if preset is gpkit.wgan_gp else {})}
    with pytest.raises(RuntimeError, match=r"batch norm is in training mode.*their sum is zero"):
        preset()(net, **given)
    preset(forward="eval")(net, **given)


LACKING = {
    "cdist": (lambda h: torch.cdist(h, h[:3].detach() + 1), r"torch\.cdist has no.*euclid"),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid has no second derivative"),
}


@pytest.mark.parametrize("name", LACKING)
def test_an_operation_without_a_second_derivative_is_named_at_the_call(name):
    function, words = LACKING[name]
    net = mlp(nn.Tanh(), Call(function), Call(lambda h: F.pad(h, (0, 8 - h.shape[1]))))
    with pytest.raises(RuntimeError, match=words) as error:
        gpkit.r1()(net, real=X)
    assert "\n" not in str(error.value)


def test_the_advice_for_cdist_works():
    centre = torch.randn(8, 8)
    mode = "use_mm_for_euclid_dist"
    net = mlp(nn.Tanh(), Call(lambda h: torch.cdist(h, centre, compute_mode=mode)))
    assert gpkit.r1()(net, real=X).requires_grad


def test_a_frozen_critic_is_refused_where_its_output_is_given():
    net, z = mlp().requires_grad_(False), X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"all parameters of the net are frozen: call net\.req"):
        gpkit.r1()(net(z), z)
    with torch.no_grad():
        with torch.enable_grad():
            y = net(z)
        assert gpkit.r1()(y, z) > 0
    gpkit.r1()((z**3).sum(1), z)  # a function without parameters is no frozen net


ESTIMATES = {
    "projection of a Jacobian": ("projection", 3, "norm", True),
    "projection of a gradient": ("projection", 1, "norm", False),
    "projection, squared": ("projection", 3, "squared", False),
    "projection, n to the 4": ("projection", 3, gpkit.power(4), True),
    "projection, (n - 0)²": ("projection", 3, gpkit.two_sided(0.0), False),
    "taylor": ("taylor", 1, gpkit.two_sided(1.0), True),
    "exact": ("exact", 3, "norm", False),
}


@pytest.mark.parametrize("kind", ESTIMATES)
def test_the_root_of_an_estimate_is_warned_of(kind):
    estimator, outputs, form, warns = ESTIMATES[kind]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
    penalty = gpkit.GradientPenalty(estimator=estimator, form=form)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        penalty(net, X)
        penalty(net, X)  # once for a net
    found = [w for w in said if "random estimate of n²" in str(w.message)]
    assert len(found) == warns


def test_layer_norm_inside_of_a_second_derivative_is_right_in_a_function():
    """A residual u_y - u_xx: torch's third derivative of layer norm is wrong, without an error."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(5, 2, dtype=torch.float64)

    def residual(z):
        z = z if z.requires_grad else z.requires_grad_()
        (g,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
        (h,) = torch.autograd.grad(g[:, 0].sum(), z, create_graph=True)
        return g[:, 1] - h[:, 0]

    def truth(params):
        def u(z):
            a = params["0.weight"] @ z + params["0.bias"]
            c = a - a.mean()
            a = c * (c.square().mean() + 1e-5).rsqrt() * params["1.weight"] + params["1.bias"]
            return params["3.weight"][0] @ a.tanh() + params["3.bias"][0]

        def r(z):
            g = torch.func.grad(u)
            return g(z)[1] - torch.func.grad(lambda q: g(q)[0])(z)[0]

        return torch.func.vmap(torch.func.grad(r))(x).square().sum(1).mean()

    params = {k: v.detach() for k, v in net.named_parameters()}
    grads = torch.func.grad(truth)(params)
    penalty = gpkit.input_grad_norm(weight=1.0)
    for _ in range(2):  # known from the second call on
        value = penalty(residual, x)
        torch.testing.assert_close(value, truth(params), rtol=1e-12, atol=0)
        value.backward()
        for name, p in net.named_parameters():
            if name != "3.bias":  # it has no effect
                torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-12)
        net.zero_grad()
    z = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"layer norm.* is wrong: give the penalty a callable"):
        gpkit.input_grad_norm()(residual(z), z)


def test_inputs_that_need_a_gradient_are_no_new_net(monkeypatch):
    """As where a step has a penalty in its inputs as well: the net is looked at once."""
    looked, trains = [], gpkit.gradient_penalty.trains
    noting = lambda *args, **options: looked.append(1) or trains(*args, **options)  # noqa: E731
    monkeypatch.setattr(gpkit.gradient_penalty, "trains", noting)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    penalty = gpkit.weight_grad_norm(form=gpkit.power(2.0, norm="l1"))  # which has no shortcut
    for _ in range(3):
        x = torch.randn(5, 3, requires_grad=True)
        penalty(net(x).square().mean(), net).backward()
    assert len(looked) == 1
    other = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1))
    penalty(other(x).square().mean(), other)
    assert len(looked) == 2
