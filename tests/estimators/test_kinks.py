"""Finite differences of nets with kinks agree with double backprop: each unit keeps its piece."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import gradients, relative_error
from torch import nn

import gpkit

KINDS = ("weight", "input")


class Of(nn.Module):
    """A module of a function, such as a maximum."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def image(x):
    return x.reshape(len(x), 1, 8, 8)


def twice(x):
    return x.repeat(1, 2)


FUNCTIONS = {
    "abs": torch.abs,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "clamp": lambda x: x.clamp(-0.3, 0.5),
    "clamp by tensors": lambda x: torch.clamp(x, -x.detach().abs() / 2, x * 2),
    "maximum": lambda x: torch.maximum(x, 0.2 * x),
    "maximum with a column": lambda x: torch.maximum(x, x.mean(1, keepdim=True)),
    "maxout": lambda x: twice(x.unflatten(1, (-1, 2)).max(2)[0]),
    "amax": lambda x: twice(x.unflatten(1, (-1, 2)).amax(2)),
    "amin, kept": lambda x: x - x.unflatten(1, (2, -1)).amin((1, 2), keepdim=True)[:, 0],
    "max of all": lambda x: x - torch.stack([row.max() for row in x])[:, None],
    "topk": lambda x: twice(x.topk(32, 1)[0]),
    "sort": lambda x: x.sort(1)[0],
    "max norm": lambda x: x / torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True),
    "relu6": F.relu6,
    "softshrink": lambda x: F.softshrink(x, 0.1),
    "in place": lambda x: F.relu_(x * 1),
    "pool 1d": lambda x: twice(F.max_pool1d(x, 2)),
    "pool 2d": lambda x: F.max_pool2d(image(x), 3, 1, 1).flatten(1),
    "pool 3d": lambda x: F.max_pool3d(image(x)[:, :, None], (1, 3, 3), 1, (0, 1, 1)).flatten(1),
    "adaptive pool": lambda x: F.adaptive_max_pool2d(image(x), 4).flatten(1).repeat(1, 4),
}
MODULES = {
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "PReLU": nn.PReLU,
    "ELU": lambda: nn.ELU(1.7),
    "SELU": nn.SELU,
    "Hardswish": lambda: Of(lambda x: F.hardswish(8 * x)),
}
FEW = ("max norm", "amin, kept", "max of all")  # so few kinks that often none is crossed
ALL = {**MODULES, **{name: lambda f=f: Of(f) for name, f in FUNCTIONS.items()}}


def setting(act, dtype):
    layers = [nn.Linear(16, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10)]
    net = nn.Sequential(*layers).to(dtype)
    return net, torch.randn(64, 16, dtype=dtype), torch.randint(10, (64,))


def losses(net, x, y):
    return F.cross_entropy(net(x), y, reduction="none")


def by_double_backprop(kind, net, x, y):
    """The penalty ‖∇L‖², or the mean of the samples' ‖∇ℓ‖², in plain torch."""
    variables = [*net.parameters()] if kind == "weight" else [x.clone().requires_grad_()]
    value = losses(net, x if kind == "weight" else variables[0], y)
    total = value.mean() if kind == "weight" else value.sum()
    found = torch.autograd.grad(total, variables, create_graph=True)
    squares = sum(g.square().sum() for g in found)
    return squares if kind == "weight" else squares / len(x)


def difference(kind, net, x, y, **options):
    estimator = gpkit.finite_difference(**options)
    if kind == "weight":
        penalty = gpkit.weight_grad_norm(1.0, estimator=estimator)
        return penalty(lambda: losses(net, x, y).mean(), net)
    return gpkit.input_grad_norm(1.0, estimator=estimator)(lambda z: losses(net, z, y), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_the_pieces_are_those_of_the_first_point(name, kind):
    """At a coarse step many units change sides: without gates the error is 30 to 6000 %."""
    net, x, y = setting(ALL[name], torch.float64)
    value = by_double_backprop(kind, net, x, y)
    true = gradients(value, net)
    assert relative_error(difference(kind, net, x, y), value) < 1e-12
    held, crossed = (
        relative_error(
            gradients(difference(kind, net, x, y, step=0.01, cross_kinks=cross), net), true
        )
        for cross in (False, True)
    )
    assert held < (0.4 if name in ("topk", "sort") else 0.1)  # of curvature, and of flipped values
    assert crossed > 0.2 or name in FEW


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "pool 2d"])
def test_the_default_step_in_float32(name, kind):
    for _ in range(3):
        net, x, y = setting(ALL[name], torch.float32)
        wide = copy.deepcopy(net).double()
        true = gradients(by_double_backprop(kind, wide, x.double(), y), wide)
        assert relative_error(gradients(difference(kind, net, x, y), net).double(), true) < 0.03


def test_kinks_are_crossed_on_request():
    net, x, y = setting(nn.ReLU, torch.float32)
    true = gradients(by_double_backprop("weight", net, x, y), net)
    crossed = gradients(difference("weight", net, x, y, step=0.01, cross_kinks=True), net)
    assert relative_error(crossed, true) > 0.5
    given = gpkit.gnp(r=0.05).estimator  # SAM: the plain gradient at the moved weights
    assert given == gpkit.finite_difference(0.05, cross_kinks=True)


def test_with_loss():
    """The graph of the loss is gone when the penalty acts: its gates are not."""
    net, x, y = setting(nn.ReLU, torch.float64)
    loss = losses(net, x, y).mean()
    true = gradients(loss + by_double_backprop("weight", net, x, y), net)
    penalty = gpkit.weight_grad_norm(1.0, estimator=gpkit.finite_difference(0.01))
    for _ in range(2):
        total = penalty.with_loss(lambda: losses(net, x, y).mean(), net)
        assert relative_error(gradients(total, net), true) < 0.06


def test_checkpointing():
    net, x, y = setting(nn.ReLU, torch.float64)
    true = gradients(by_double_backprop("weight", net, x, y), net)

    def loss():
        out = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        return F.cross_entropy(out, y)

    penalty = gpkit.weight_grad_norm(1.0, estimator=gpkit.finite_difference(0.01))
    assert relative_error(gradients(penalty(loss, net), net), true) < 0.06


def test_other_pieces_on_the_second_run_are_said():
    net, x, y = setting(nn.ReLU, torch.float64)
    runs = []

    def loss():
        runs.append(1)
        out = net(x) + 9
        out = out if len(runs) == 1 else out.relu()
        return F.cross_entropy(out, y)

    # The output of the net is positive, so another ReLU changes no value.
    penalty = gpkit.weight_grad_norm(1.0, estimator="finite_difference")
    with pytest.warns(UserWarning, match="has other piecewise operations .* when it runs again"):
        penalty(loss, net)


def test_no_node_is_kept_alive():
    """A hook that refers to its node would keep each step's graph for ever."""
    import gc
    import weakref

    net, x, y = setting(lambda: nn.Sequential(nn.ReLU(), nn.PReLU()), torch.float64)
    kept = []

    def f(z):
        out = net(z)
        kept.append(weakref.ref(out))
        return F.cross_entropy(out, y, reduction="none")

    penalty = gpkit.input_grad_norm(1.0, estimator="finite_difference")
    with warnings.catch_warnings():
        penalty(f, x).backward()
    gc.collect()
    assert {out() for out in kept} == {None}
