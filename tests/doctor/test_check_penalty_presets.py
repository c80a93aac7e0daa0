"""`check_penalty` passes all presets."""

import copy

import pytest
import torch
from checked import B, images, points
from scenes import squared_errors

import gpkit
from gpkit.presets import PRESETS


def weight_scene(preset):
    """A preset in the weights, with the loss of a net and targets."""
    options = {"hessian": {"estimator": "exact"}, "fishr": {"weight": 1.0}}  # 0 at first
    act = PRESETS[preset](**options.get(preset, {}))

    def fn(net, x, target, env):
        if preset == "irm":
            return act(lambda: net(x), target.argmax(1), env)
        if preset == "fishr":
            return act(lambda: (net(x), x), target.argmax(1), env)
        if preset == "fisher":
            return act(lambda: net(x), net)
        errors = lambda: squared_errors(net(x), target)  # noqa: E731
        return act(errors if preset == "per_sample_grad_norm" else lambda: errors().mean(), net)

    net, x = points(3)
    return fn, net, (x, torch.randn(B, 3), torch.tensor([0, 1, 1, 0, 1, 0])), {}


def input_scene(preset):
    """A preset in the inputs."""
    apart = {"sigma": 0.3} if preset.startswith("approximate") else {}  # bfloat16 has no 0.01
    act = PRESETS[preset](**apart)
    net, real, fake = images(3)
    target = torch.randn(B, 3)
    if preset in ("input_grad_norm", "lipschitz_policy", "cure"):
        fn = lambda net, x, y: act(lambda x: squared_errors(net(x), y), x)  # noqa: E731
        return fn, net, (real, target), {}
    if preset == "sobolev":
        critic = images()[0]
        return act, critic, (real,), {"target": fake, "like": PRESETS[preset]()}
    if preset == "right_reasons":
        return act, net, (real,), {"metric": fake > 0, "like": PRESETS[preset]()}
    if preset == "contractive":
        return (
            PRESETS[preset](activation="1"),
            net,
            (real,),
            {"like": PRESETS[preset](activation="1")},
        )
    if preset in ("curvature", "laplacian", "eikonal"):
        return act, *(lambda net, x: (net, (x,)))(*points()), {"like": PRESETS[preset]()}
    if preset in ("jacobian", "spectral_jacobian", "duq", "path_length"):
        return act, net, (real,), {} if preset == "path_length" else {"like": PRESETS[preset]()}
    critic = images()[0]
    if preset in ("r1", "approximate_r1", "dragan"):
        fn = lambda net, x: act(net, real=x)  # noqa: E731
        return fn, critic, (real,), {"like": PRESETS[preset](**apart)}
    if preset in ("r2", "approximate_r2"):
        fn = lambda net, x: act(net, fake=x)  # noqa: E731
        return fn, critic, (fake,), {"like": PRESETS[preset](**apart)}
    fn = lambda net, x, y: act(net, real=x, fake=y)  # noqa: E731
    return fn, critic, (real, fake), {"like": PRESETS[preset]()}


WEIGHTS = {
    "weight_grad_norm", "per_sample_grad_norm", "fisher", "irm", "fishr", "hessian", "gnp", "sam",
}  # fmt: skip


QUICK = ("wgan_gp", "right_reasons")


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(PRESETS.keys() - {"none"})
    ],
)
def test_all_presets_pass(preset):
    fn, net, samples, options = (weight_scene if preset in WEIGHTS else input_scene)(preset)
    if preset in ("sam", "gnp"):  # their gradient is not that of their value, by definition
        options = {**options, "like": copy.deepcopy(fn)}
    gpkit.check_penalty(fn, net, *samples, **options)
