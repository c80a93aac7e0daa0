"""`target=`, `metric=` and `sample_weight=` of a call, against hand-written formulas in float64."""

import pytest
import torch
from compared import (
    ESTIMATORS,
    MASK,
    NET,
    NORMS,
    RNG,
    SCALE,
    B,
    G,
    W,
    X,
    assert_same,
    by_hand,
    conv,
    draw,
    measured,
    params_of,
    slopes,
)
from torch.func import jacrev, vmap

import gpkit

GIVEN = {
    "target": {"target": G},
    "mask": {"metric": MASK},
    "both": {"target": G, "metric": SCALE},
    "weights": {"sample_weight": W},
    "all": {"target": G, "metric": SCALE, "sample_weight": W},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize(("estimator", "rtol"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_inputs_for_a_callable(given, estimator, rtol):
    penalty = gpkit.GradientPenalty(estimator=estimator)
    wanted = by_hand(given.get("target", 0.0), given.get("metric", 1.0), given.get("sample_weight"))
    assert_same(measured(penalty, NET, X, **given), wanted, rtol)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_inputs_for_a_tensor(given):
    x = X.clone().requires_grad_()
    wanted = by_hand(given.get("target", 0.0), given.get("metric", 1.0), given.get("sample_weight"))
    assert_same(measured(gpkit.GradientPenalty(), NET(x), x, **given), wanted)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["exact", "difference", "step"])
def test_other_norms_and_forms(norm, name):
    estimator, rtol = ESTIMATORS[name]
    penalty = gpkit.GradientPenalty(form=gpkit.two_sided(0.7, norm=norm), estimator=estimator)
    wanted = by_hand(G, SCALE, W, norm, lambda n: (n - 0.7) ** 2)
    found = measured(penalty, NET, X, target=G, metric=SCALE, sample_weight=W)
    assert_same(found, wanted, rtol)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_target_with_a_graph_is_trained(name):
    estimator, rtol = ESTIMATORS[name]
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    value = gpkit.GradientPenalty(estimator=estimator)(NET, X, target=scale * G, metric=SCALE)
    (found,) = torch.autograd.grad(value, scale)
    g = slopes(params_of(NET))
    wanted = (2 * SCALE**2 * (0.5 * G - g) * G).flatten(1).sum(1).mean()
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


def test_a_linear_function_is_pulled_to_its_target():
    """‖w - g‖² for f = w·x, whose gradient is 2 (w - g)."""
    w, g = draw(3).requires_grad_(), draw(3)
    value = gpkit.GradientPenalty()(lambda x: x @ w, draw(4, 3), target=g)
    torch.testing.assert_close(value, (w - g).square().sum())
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], 2 * (w - g))


def test_forces_of_a_molecule():
    """The mean over samples of ‖-∇E - F‖², from dict-free inputs [B, N, 3]."""
    x, forces, k = draw(4, 6, 3), draw(4, 6, 3), torch.tensor(1.3, dtype=torch.float64)
    k.requires_grad_()
    penalty = gpkit.GradientPenalty(of=lambda energy: -energy)
    value = penalty(lambda x: k / 2 * x.flatten(1).square().sum(1), x, target=forces)
    torch.testing.assert_close(value, (-k * x - forces).flatten(1).square().sum(1).mean())


@pytest.mark.parametrize("estimator", ["exact", gpkit.projection(5)], ids=["exact", "projection"])
def test_several_outputs(estimator):
    net, g = conv(3), draw(B, 3, 2, 3, 3)
    J = vmap(jacrev(lambda z: net(z.unsqueeze(0))[0]))(X).detach()
    penalty = gpkit.GradientPenalty(estimator=estimator, seed=0)
    wanted = (MASK * (J - g)).flatten(1).square().sum(1)
    rtol, many = (1e-9, 1) if estimator == "exact" else (0.02, 4000)  # each has its own directions
    found = penalty.terms(
        net, X.repeat(many, 1, 1, 1), target=g.repeat(many, 1, 1, 1, 1), metric=MASK
    ).values.reshape(many, B)
    torch.testing.assert_close(found.mean(0), wanted, rtol=rtol, atol=0)
    if estimator == "exact":
        A = draw(B, 3, 2, 3, 3)
        found = penalty.terms(net, X, target=g, metric=A).values
        torch.testing.assert_close(found, (A * (J - g)).flatten(1).square().sum(1))


def test_a_second_derivative():
    A = draw(3, 3).requires_grad_()
    x, g, mask = draw(4, 3), draw(4, 3, 3), (draw(3, 3) > 0).double()
    penalty = gpkit.GradientPenalty(order=2, estimator="exact")
    value = penalty(lambda x: torch.einsum("bi,ij,bj->b", x, A, x), x, target=g, metric=mask)
    wanted = (mask * (A + A.T - g)).flatten(1).square().sum(1).mean()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(torch.autograd.grad(value, A)[0], torch.autograd.grad(wanted, A)[0])


def test_pixels():
    x, g, w = draw(2, 3, 2, 2), draw(2, 3, 2, 2), torch.tensor([1.0, 0.5])
    a = draw(3, 2, 2).requires_grad_()
    penalty = gpkit.GradientPenalty(scope="pixel", form=gpkit.two_sided(1.0))
    n = (a - g).square().sum(1).sqrt()  # [B, H, W]
    wanted = ((n - 1) ** 2 * w.reshape(2, 1, 1)).sum() / (4 * w.sum())
    f = lambda x: (a * x).flatten(1).sum(1)  # noqa: E731
    torch.testing.assert_close(penalty(f, x, target=g, sample_weight=w), wanted)
    each = torch.rand(2, 2, 2, generator=RNG, dtype=torch.float64)
    wanted = ((n - 1) ** 2 * each).sum() / each.sum()
    torch.testing.assert_close(penalty(f, x, target=g, sample_weight=each), wanted)


@pytest.mark.parametrize("name", ["exact", "difference"])
def test_zero_and_one_weights_are_the_subset(name):
    """Also for samples whose value is not finite."""
    estimator = ESTIMATORS[name][0]
    x = X.clone()
    x[1] = torch.inf
    keep = torch.tensor([1, 0, 1, 1, 0])
    penalty = gpkit.GradientPenalty(estimator=estimator)
    found = penalty.terms(NET, x, sample_weight=keep)
    alone = penalty.terms(NET, X[keep.bool()])
    torch.testing.assert_close(found.reduced, alone.reduced)
    torch.testing.assert_close(found.mean_norm, alone.mean_norm)
    summed = gpkit.GradientPenalty(estimator=estimator, reduce="sum")
    torch.testing.assert_close(
        summed(NET, X, sample_weight=keep), summed(NET, X[keep.bool()]), rtol=1e-6, atol=0
    )
    zero = measured(gpkit.GradientPenalty(), NET, X, sample_weight=torch.zeros(B))
    assert float(zero[0]) == 0
    assert not zero[1].any()


def test_a_scaled_gradient_has_the_same_norm():
    given = {"target": G, "metric": SCALE, "sample_weight": W}
    for name in ("exact", "difference"):
        penalty = gpkit.GradientPenalty(estimator=ESTIMATORS[name][0])
        plain, scaled = (measured(penalty, NET, X, scale=s, **given) for s in (None, 1024.0))
        assert_same(scaled, plain, 1e-7)


def test_a_metric_that_follows_the_variable():
    """Elasticities: ‖x ∘ ∇f‖²."""
    penalty = gpkit.GradientPenalty(metric=torch.abs)
    assert_same(measured(penalty, NET, X), by_hand(metric=X.abs()))
    assert_same(measured(penalty, NET, X, metric=SCALE), by_hand(metric=SCALE))
    assert "abs" in repr(penalty)


def test_a_sum_passes_what_is_given_to_each_part():
    parts = gpkit.sum({"a": gpkit.r1(weight=2.0), "b": gpkit.eikonal(weight=3.0)})
    found = measured(parts, NET, X, target=G, sample_weight=W)
    a, b = by_hand(G, w=W), by_hand(G, w=W, form=lambda n: (n - 1) ** 2)
    assert_same(found, [p + 3 * q for p, q in zip(a, b, strict=True)])


@pytest.mark.parametrize(
    ("axes", "given", "words"),
    [
        ({"estimator": gpkit.taylor()}, {"target": G}, "taylor.* takes no target= and no metric="),
        ({"estimator": "power_iteration"}, {"metric": MASK}, "takes no target="),
        ({"estimator": "projection", "order": 2}, {"target": 1.0}, "at order=1; got order=2"),
        ({}, {"target": G[:, :1]}, r"the derivative, \[5, 2, 3, 3\]; got \[5, 1, 3, 3\]"),
        ({}, {"target": G[:3]}, r"\[5, 2, 3, 3\]; got \[3, 2, 3, 3\]"),
        ({}, {"target": "forces"}, "target= must be a tensor; got a str"),
        ({}, {"target": [G, G]}, "one tensor for each of 1 inputs; got 2"),
        ({}, {"metric": G.clone().requires_grad_()}, "must be constant"),
        ({}, {"sample_weight": W[:3]}, r"one number for each sample, \[5\], or .*; got \[3\]"),
        ({}, {"sample_weight": -W}, "must be >= 0; got -2.5"),
        ({}, {"sample_weight": 0.5}, r"must be a tensor \[B\]; got a float"),
        ({"order": 2}, {"metric": torch.abs}, "takes order=1; got order=2: give a tensor"),
        ({"reduce": "max"}, {"sample_weight": W}, "reduce='mean' or 'sum'; got 'max'"),
        ({"form": gpkit.two_sided(gpkit.running_average())}, {"sample_weight": W}, "average"),
        ({"given": {"target": "forces"}}, {}, "needs target=.*entry 'forces' of the batch"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(axes, given, words):
    penalty = gpkit.GradientPenalty(**axes)
    with pytest.raises((ValueError, TypeError), match=words) as error:
        penalty(NET, X, **given)
    assert "\n" not in str(error.value)


def test_other_kinds_of_penalties_refuse():
    logits = draw(4, 2).requires_grad_()
    with pytest.raises(TypeError, match="irm takes no target=: it compares no derivative"):
        gpkit.irm()(logits, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), target=G)
    with pytest.raises(TypeError, match=r"takes no sample_weights= \(did you mean 'sample_weight'"):
        gpkit.r1().terms(NET, real=X, sample_weights=W)
    with pytest.raises(ValueError, match=r"must be one of 'target', 'metric', 'sample_weight'"):
        gpkit.r1(given={"targets": "forces"})
    with pytest.raises(TypeError, match="must be a function of the variable"):
        gpkit.r1(metric=MASK)


@pytest.mark.parametrize("estimator", [gpkit.jvp(3), gpkit.random_difference(0.1, 3)])
def test_a_metric_without_a_target_in_forward_estimators(estimator):
    """As with a target of zero."""
    penalty = gpkit.GradientPenalty(estimator=estimator, seed=0)
    alone = penalty.terms(NET, X, metric=SCALE).norms
    torch.testing.assert_close(alone, penalty.terms(NET, X, metric=SCALE, target=0 * G).norms)
    assert alone.unique().numel() == B


def test_a_weight_that_adapts_sees_the_weighted_mean_norm():
    weight = gpkit.target_norm(1.0, weight=2.0, rate=0.5)
    penalty = gpkit.GradientPenalty(weight=weight)
    penalty(NET, X, sample_weight=W, step=0)
    n = NORMS["l2"](slopes(params_of(NET)))
    mean = float((W * n).sum() / W.sum())
    assert abs(mean / float(n.mean()) - 1) > 0.1
    correction = 0.5 * min(1.0, max(-1.0, torch.tensor(mean).log().item()))
    assert weight(1) == pytest.approx(2.0 * torch.tensor(correction).exp().item(), rel=1e-5)


@pytest.mark.parametrize("estimator", [gpkit.jvp(2), gpkit.random_difference(0.1)])
def test_a_metric_of_each_output_is_refused_where_all_move_alike(estimator):
    penalty = gpkit.GradientPenalty(estimator=estimator)
    with pytest.raises(ValueError, match=r"same for all of them.*use estimator='exact'"):
        penalty(conv(2), X, metric=draw(B, 2, 2, 3, 3))
    exact = gpkit.GradientPenalty(estimator="exact")
    assert exact(conv(2), X, metric=draw(B, 2, 2, 3, 3)).isfinite()
