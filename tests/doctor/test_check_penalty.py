"""`check_penalty` names each hand-written bug, and passes right penalties."""

import penalties_by_hand as by_hand
import pytest
import torch
from checked import failures, images, labels, points
from torch.nn import functional as F

import gpkit


def reference(fn, *args):
    """What `like=` is for a penalty by hand, from another source than itself."""
    losses = lambda net, y: lambda x: F.cross_entropy(net(x), y, reduction="none")  # noqa: E731
    return {
        by_hand.wgan_gp: gpkit.wgan_gp(),
        by_hand.r1: gpkit.r1(weight=1.0),
        by_hand.dragan: gpkit.dragan(),
        by_hand.laplacian: gpkit.laplacian(weight=1.0),
        by_hand.laplacian_func: by_hand.laplacian,
        by_hand.jacobian: gpkit.jacobian(weight=1.0),
        by_hand.jacobian_func: by_hand.jacobian,
        by_hand.jacobian_projected: gpkit.jacobian(weight=1.0),
        by_hand.weight_grad_norm: lambda net, x, y: gpkit.weight_grad_norm(weight=1.0)(
            lambda: F.cross_entropy(net(x), y), net
        ),
        by_hand.sum_of_losses: lambda net, x, y: gpkit.input_grad_norm()(losses(net, y), x),
    }[fn]


CRITICS = (by_hand.wgan_gp, by_hand.r1, by_hand.dragan)
FIELDS = (by_hand.laplacian, by_hand.laplacian_func)


@pytest.mark.parametrize(
    "like",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["alone", "like"],
)
@pytest.mark.parametrize(
    "fn",
    [
        *CRITICS,
        by_hand.laplacian,
        pytest.param(by_hand.laplacian_func, marks=pytest.mark.slow),
        by_hand.jacobian,
        pytest.param(by_hand.jacobian_func, marks=pytest.mark.slow),
        pytest.param(by_hand.jacobian_projected, marks=pytest.mark.slow),
        by_hand.weight_grad_norm,
        by_hand.sum_of_losses,
    ],
    ids=lambda fn: fn.__name__,
)
def test_right_penalties_pass(fn, like):
    if fn in FIELDS:
        net, x = points()
        samples = (x,)
    else:
        net, real, fake = images(1 if fn in CRITICS else 3)
        takes = fn.__code__.co_argcount - 1
        other = fake if fn in CRITICS else labels()
        samples = (real, other)[:takes]
    report = gpkit.check_penalty(fn, net, *samples, like=reference(fn) if like else None)
    checked = {check.name for check in report.checks if check.passed}
    assert {"float64", "gradient", "order", "zero", "side_effects", "autocast"} <= checked
    assert ("formula" in checked) == like
    assert {"samples", "entries"} <= checked or fn is by_hand.weight_grad_norm
    seen = isinstance(reference(fn), gpkit.GradientPenalty) if like else fn is by_hand.wgan_gp
    assert ("points" in checked) == seen


@pytest.mark.parametrize(
    ("fn", "scene", "alone", "like", "said"),
    [
        (by_hand.norm_over_channels, "pairs", "entries", gpkit.wgan_gp(), "norm over one axis"),
        (by_hand.one_alpha_for_the_batch, "pairs", "points", None, "one α for each sample"),
        (by_hand.one_alpha_an_entry, "pairs", "points", None, "not one for each entry"),
        (by_hand.norm_of_the_batch, "pairs", "samples", gpkit.wgan_gp(), "whole batch"),
        (by_hand.root_of_zero, "pairs", "zero", None, "epsilon inside"),
        (by_hand.no_create_graph, "pairs", "gradient", gpkit.wgan_gp(), "create_graph=True"),
        (by_hand.half_a_graph, "images", "gradient", gpkit.r1(2.0), "0.weight, 0.bias, 3.weight"),
        (by_hand.clean_instead_of_noised, "images", "noise", None, "noised tensor"),
        (by_hand.r1_of_clean, "pairs", None, by_hand.r1_of_noised, "another form, norm or point"),
        (by_hand.row_sums_of_the_hessian, "points", "entries", gpkit.laplacian(1.0), "Hessian"),
        (by_hand.mean_loss, "labels", "samples", by_hand.sum_of_losses, "factor 1/B"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_bug_is_named(fn, scene, alone, like, said):
    net, real, fake = images(3 if scene == "labels" else 1)
    if scene == "points":
        net, real = points()
    others = {"pairs": (fake,), "labels": (labels(),)}.get(scene, ())
    found = failures(fn, net, real, *others, like=like)
    alone = [alone] if alone else []
    assert list(found) == alone + (["formula"] if like else [])
    assert any(said in str(check) for check in found.values())


def test_noise_that_is_not_there_is_seen_against_dragan():
    net, real, _ = images()
    found = failures(by_hand.clean_instead_of_noised, net, real, like=gpkit.dragan())
    assert list(found) == ["points", "noise"]


@pytest.mark.parametrize(
    ("fn", "ok"),
    [
        (by_hand.r1, False),
        (by_hand.scaled_inner_gradient, True),
        (by_hand.outside_of_autocast, True),
        (lambda net, x: gpkit.r1(1.0)(net, real=x, scale=2.0**14), True),
    ],
    ids=["inside of autocast, unscaled", "scaled", "outside of autocast", "gpkit, scaled"],
)
def test_an_inner_gradient_that_underflows_in_float16(fn, ok):
    net, x, _ = images()
    found = failures(fn, net, x, autocast=torch.float16)
    assert list(found) == ([] if ok else ["autocast"])
    assert ok or "underflows" in str(found["autocast"])
