"""What a penalty refuses, in words that say what to do."""

import copy
import math

import pytest
import torch
from scenes import B
from small import mlp
from torch import nn

import gpkit

NET, LINEAR, RELU = mlp(), nn.Linear(3, 1).double(), mlp(act=nn.ReLU)

FROZEN = copy.deepcopy(NET).requires_grad_(False)

X = torch.ones(B, 3, dtype=torch.float64)

Z = X.clone().requires_grad_()


def without_create_graph():
    z = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(NET(z).sum(), z)
    return g.square().sum()


def freed():
    loss = NET(X).square().mean()
    loss.backward()
    return loss


NOTHING = "does not depend on any trained parameter: "

REFUSALS = {
    "scalar loss": (
        lambda: gpkit.input_grad_norm()(NET(Z).mean(), Z),
        ValueError,
        r'one value per sample, \[5\]; got a scalar: a mean hides a factor 1/B.*reduction="none"',
    ),
    "scalar from a callable": (
        lambda: gpkit.r1()(lambda x: NET(x).sum(), real=X),
        ValueError,
        "got a scalar",
    ),
    "logits for losses": (
        lambda: gpkit.input_grad_norm()(mlp(3)(Z), Z),
        ValueError,
        r"needs losses: .*got \[5, 3\], the output of a linear layer: .* gpkit.jacobian does",
    ),
    "another batch": (
        lambda: gpkit.r1()(NET(Z)[:3], real=Z),
        ValueError,
        r"needs values per sample, \[5, ...\]; got \[3, 1\]",
    ),
    "no graph": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean().detach(), NET),
        RuntimeError,
        "nothing to differentiate: .* Was it computed under no_grad, detached",
    ),
    "without create_graph": (
        lambda: gpkit.weight_grad_norm()(without_create_graph, NET),
        RuntimeError,
        "without create_graph=True",
    ),
    "graph is gone": (
        lambda: gpkit.weight_grad_norm()(freed(), NET),
        RuntimeError,
        r"call the penalty before loss.backward\(\)",
    ),
    "forgotten requires_grad": (
        lambda: gpkit.input_grad_norm()(NET(X), X),
        ValueError,
        r"do not require grad; call x.requires_grad_\(\) before the forward",
    ),
    "requires_grad after the forward": (
        lambda: gpkit.input_grad_norm()(NET(X), X.clone().requires_grad_()),
        RuntimeError,
        NOTHING + r".* on the inputs: call x.requires_grad_\(\) before the forward",
    ),
    "weights of another net": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean(), LINEAR),
        RuntimeError,
        NOTHING + ".* on the weights: was it computed from other parameters",
    ),
    "ReLU at order 2": (
        lambda: gpkit.curvature()(RELU, X),
        RuntimeError,
        NOTHING + r"order 2 of a piecewise-linear net \(Relu\) is zero everywhere: .*GELU",
    ),
    "linear at order 2": (
        lambda: gpkit.curvature()(LINEAR, X),
        RuntimeError,
        NOTHING + "the derivative of order 2 does not depend on them. Is the function linear",
    ),
    "linear in its weights": (
        lambda: gpkit.weight_grad_norm()(LINEAR(X).mean(), LINEAR),
        RuntimeError,
        NOTHING + "the derivative of order 1 does not depend on them",
    ),
    "frozen parameters": (
        lambda: gpkit.weight_grad_norm()(lambda: FROZEN(X).mean(), FROZEN),
        ValueError,
        "none of the 4 parameters requires grad: all are frozen",
    ),
    "list with other things": (
        lambda: gpkit.r1()(lambda x: [NET(x), None], real=X),
        TypeError,
        r"must return a tensor; got a list: select one with `of=lambda output: output\[0\]`",
    ),
    "integers": (
        lambda: gpkit.r1()(NET, real=torch.ones(B, 3).long()),
        TypeError,
        "needs floating-point samples; got torch.int64",
    ),
    "tensor, but other points": (
        lambda: gpkit.wgan_gp()(NET(Z), real=Z, fake=Z),
        ValueError,
        r"`at=interpolate\(\)` needs a callable",
    ),
    "samples twice": (
        lambda: gpkit.r1()(NET, X, real=X),
        TypeError,
        "pass the samples once",
    ),
    "no samples": (lambda: gpkit.r1()(NET), TypeError, r"needs samples: .* got none"),
    "samples in a row": (
        lambda: gpkit.r1()(NET, X, X),
        TypeError,
        r"several inputs go into one tuple: .* got 2 arguments after f",
    ),
    "neither tensor nor callable": (lambda: gpkit.r1()(3, X), TypeError, "got a int"),
    "loss that is a number": (
        lambda: gpkit.weight_grad_norm()(0.3, NET),
        TypeError,
        "expected a tensor or a callable; got a float",
    ),
    "no net": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean()),
        TypeError,
        r"penalty\(loss, net.parameters\(\)\); got 0 arguments after the loss",
    ),
    "real in a weight penalty": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean(), NET, real=X),
        TypeError,
        "takes no real= or fake=",
    ),
    "parameters that are none": (
        lambda: gpkit.weight_grad_norm()(NET(X).mean(), ["0.weight"]),
        TypeError,
        "number 0 is a str",
    ),
    "pattern without names": (
        lambda: gpkit.weight_grad_norm(match="0.*")(NET(X).mean(), NET.parameters()),
        TypeError,
        r"`weights\('0.\*'\)` selects by name: pass the module",
    ),
    "pattern that matches nothing": (
        lambda: gpkit.weight_grad_norm(match="0.wieght")(NET(X).mean(), NET),
        ValueError,
        r"matches none of 4 parameters \(did you mean '0.weight'\?\)",
    ),
    "matrix for a loss": (
        lambda: gpkit.weight_grad_norm()(mlp(3)(X), NET),
        ValueError,
        r"needs losses: .*got \[5, 3\], the output of a linear layer: .* gpkit.jacobian does",
    ),
    "scalar per sample": (
        lambda: gpkit.weight_grad_norm(scope="sample")(NET(X).mean(), NET),
        ValueError,
        r'scope="sample" needs one loss per sample, \[B\]; got a scalar',
    ),
}


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS.values(), ids=REFUSALS)
def test_refuses_a_call(act, error, said):
    with pytest.raises(error, match=said):
        act()


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ({"wrt": "inptu"}, r"`wrt=...` must be one of 'input', 'weight'; .* mean 'input'\?\)"),
        (
            {"of": "lost"},
            r"`of=...` must be one of 'output', 'loss', 'sampled_loss'; got 'lost' \(did .* 'loss'",
        ),
        ({"scope": "samples", "wrt": "weight"}, "'batch', 'sample', .* mean 'sample'"),
        ({"scope": "batch"}, "`scope=...` must be one of 'sample', 'pixel'; got 'batch'"),
        ({"form": "square"}, r"mean 'squared'\?"),
        ({"at": "interpolat"}, r"mean 'interpolate'\?"),
        ({"estimator": "exactly"}, r"mean 'exact'\?"),
        ({"order": 0}, "`order=...` must be an integer >= 1; got 0"),
        ({"order": 1.0}, "`order=...` must be an integer >= 1; got 1.0"),
        ({"order": True}, "`order=...` must be an integer >= 1; got True"),
        ({"seed": -1}, "`seed=...` must be an integer >= 0; got -1"),
        ({"weight": math.nan}, "`weight=...` must be a number >= 0; got nan"),
        ({"weight": math.inf}, "`weight=...` must be a number >= 0; got inf"),
        ({"weight": -1}, "`weight=...` must be a number >= 0; got -1"),
        ({"weight": "0.1"}, "`weight=...` must be a number >= 0; got '0.1'"),
        ({"weight": True}, "`weight=...` must be a number >= 0; got True"),
        ({"weight": None}, "`weight=...` must be a number >= 0; got None"),
    ],
    ids=str,
)
def test_refuses_an_axis(axis, said):
    with pytest.raises(ValueError, match=said):
        gpkit.GradientPenalty(**axis)
    if "wrt" not in axis:
        with pytest.raises(ValueError, match=said):
            gpkit.r1(**axis)


def test_a_frozen_net_is_refused_and_has_a_value_under_no_grad():
    penalty = gpkit.r1()
    with pytest.raises(RuntimeError, match=r"all parameters of the net are frozen: call net\.req"):
        penalty(FROZEN, real=X)
    with torch.no_grad():
        assert penalty(FROZEN, real=X) > 0
    assert penalty(FROZEN.requires_grad_(True), real=X).requires_grad
    with pytest.raises(RuntimeError, match="all parameters of the net are frozen"):
        penalty(FROZEN.requires_grad_(False), real=X)  # also after a good call


def test_refuses_what_stops_to_act():
    # not at the first call only
    penalty, net = gpkit.weight_grad_norm(), mlp()
    penalty(net(X).square().mean(), net)
    with pytest.raises(RuntimeError, match="does not depend on any trained parameter"):
        penalty(LINEAR(X).mean(), LINEAR)
