"""A sum is its parts: values, gradients, steps, states and names."""

import copy
import pickle

import pytest
import torch
from compare import gradients, relative_error
from scenes import images

import gpkit


def both(**axes):
    return gpkit.sum({"wgan_gp": {"weight": 2.0, **axes}, "mine": {"preset": "r2", "weight": 3.0}})


def test_value_and_gradient_are_the_sums():
    # catches a part that is dropped, counted twice, or weighted by another's weight
    s = images()
    parts = gpkit.wgan_gp(weight=2.0), gpkit.r2(weight=3.0)
    separate = [part(s.net, real=s.real, fake=s.fake) for part in parts]
    together = both()(s.net, real=s.real, fake=s.fake)
    assert together == sum(separate)
    true = sum(gradients(value, s.net) for value in separate)
    assert relative_error(gradients(together, s.net), true) < 1e-12


def test_terms_are_by_name():
    s = images()
    terms = both().terms(s.net, real=s.real, fake=s.fake)
    assert list(terms) == ["wgan_gp", "mine"]
    assert [t.weight for t in terms.values()] == [2.0, 3.0]
    total = both()(s.net, real=s.real, fake=s.fake)
    assert sum(t.penalty for t in terms.values()) == total


def test_parts_keep_their_own_step_and_schedule():
    s = images()
    lazy = gpkit.sum({"r1": {"weight": 1.0, "every": 2}, "r2": {"weight": lambda step: step}})
    r1, r2 = gpkit.r1(weight=1.0), gpkit.r2(weight=1.0)
    r1, r2 = r1(s.net, real=s.real).item(), r2(s.net, fake=s.fake).item()
    for step, true in enumerate([2 * r1, r2, 2 * r1 + 2 * r2]):
        assert lazy(s.net, real=s.real, fake=s.fake).item() == pytest.approx(true, rel=1e-12)
        again = lazy(s.net, real=s.real, fake=s.fake, step=step)
        assert again.item() == pytest.approx(true, rel=1e-12)


def test_parameters_may_come_as_an_iterator():
    # the first part would exhaust net.parameters() for the second
    s = images()
    two = gpkit.sum(
        {"weight_grad_norm": {"weight": 1.0}, "again": {"preset": "weight_grad_norm", "weight": 1}}
    )
    loss = s.net(s.real).square().mean()
    one = gpkit.weight_grad_norm(weight=1.0)(loss, s.net.parameters())
    assert two(loss, s.net.parameters()) == 2 * one


def test_state_resumes_every_part():
    s, first = images(), both()
    first(s.net, real=s.real, fake=s.fake)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = both()
    second.load_state_dict(state)
    following = [p(s.net, real=s.real, fake=s.fake) for p in (first, second, copy.deepcopy(first))]
    assert following[0] == following[1] == following[2]
    assert [part.step for part in second.parts.values()] == [2, 2]


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ("r1", ["r1"]),
        (["r1", "r2"], ["r1", "r2"]),
        ({"r1": None, "r2": {}}, ["r1", "r2"]),
        ({"a": gpkit.r1(), "b": {"preset": "r1"}}, ["a", "b"]),
        ([gpkit.r1(), "r2"], ["r1", "r2"]),
        ([gpkit.sum(["r1"]), gpkit.r2()], ["r1", "r2"]),
        ({"a": gpkit.sum(["r1", "r2"]), "b": gpkit.r1()}, ["a/r1", "a/r2", "b"]),
    ],
    ids=str,
)
def test_ways_to_say_it(parts, names):
    penalty = gpkit.sum(parts)
    assert list(penalty.parts) == names
    assert all(part.weight == 10 for part in penalty.parts.values())


def test_none_adds_nothing():
    s = images()
    penalty = gpkit.sum({"none": None, "r1": {"weight": 1.0}})
    assert penalty(s.net, real=s.real) == gpkit.r1(weight=1.0)(s.net, real=s.real)


@pytest.mark.parametrize(
    ("parts", "error", "said"),
    [
        ({}, ValueError, "needs at least one penalty; got none"),
        (["r3"], ValueError, r"must be one of 'none', .* got 'r3' \(did you mean 'r2'\?\)"),
        ({"mine": {"weight": 1.0}}, ValueError, "must be one of .* got 'mine'"),
        ({"r1": 10.0}, TypeError, r"dicts of their arguments; got 10\.0 for 'r1'"),
        ([gpkit.r1(), gpkit.r1()], ValueError, "has two penalties .*r1, r1"),
        ({"r1": {"wieght": 1.0}}, TypeError, "has no argument 'wieght'"),
        ({"r1": {"weight": -1.0}}, ValueError, "must be a number >= 0; got -1.0"),
    ],
    ids=str,
)
def test_refusals(parts, error, said):
    with pytest.raises(error, match=said):
        gpkit.sum(parts)


def test_a_part_that_refuses_is_heard():
    s = images()
    with pytest.raises(ValueError, match=r"`at=fake\(\)` needs fake="):
        gpkit.sum(["r1", "r2"])(s.net, real=s.real)


def losses_of(w):
    """Return losses with ∇L = w for L their mean."""
    return torch.stack([(w**2).sum() / 2 + d for d in (-1.0, 1.0)])


@pytest.mark.parametrize("estimators", [("exact", "exact"), ("exact", "finite_difference")])
def test_with_loss_is_the_loss_and_every_part(estimators):
    # L = 25/2, ‖∇L‖² = 25, ‖∇L‖ = 5: 12.5 + 0.1·25 + 0.2·5; its gradient is w (1 + 0.2 + 0.2/5)
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    first, second = estimators
    both = gpkit.sum(
        {
            "a": gpkit.weight_grad_norm(0.1, estimator=first),
            "b": gpkit.weight_grad_norm(0.2, form="norm", estimator=second),
        }
    )
    calls = []

    def closure():
        calls.append(1)
        return losses_of(w).mean()

    total = both.with_loss(closure, [w])
    assert total.item() == pytest.approx(16.0, rel=1e-9)
    total.backward()
    torch.testing.assert_close(w.grad, (1.2 + 0.04) * w.detach(), rtol=1e-6, atol=0)
    # a closure that runs again is run once more at first, to compare
    assert len(calls) == 1 + 2 * (second != "exact")
    with pytest.raises(TypeError, match="is for weight penalties"):
        gpkit.sum({"a": gpkit.weight_grad_norm(), "x": gpkit.r1()}).with_loss(closure, [w])


def test_act_gives_the_terms_of_those_that_act_and_counts_a_step():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    both = gpkit.sum({"a": gpkit.weight_grad_norm(0.1), "b": gpkit.weight_grad_norm(1.0, every=2)})
    acted = [both.act(losses_of(w).mean(), [w]) for _ in range(2)]
    assert [[t and t.weight for t in terms.values()] for terms in acted] == [
        [0.1, 2.0],
        [0.1, None],
    ]
    assert both.step == 2
    assert both.name == "a+b"


def test_the_loss_scale_of_several_is_the_greatest():
    """(L + λP) / max(1, λ), as `rescaled` says it is done in a loop."""
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    scaled = gpkit.weight_grad_norm(gpkit.rescaled(5.0))
    both = gpkit.sum({"a": scaled, "b": gpkit.weight_grad_norm(gpkit.rescaled(2.0))})
    loss = losses_of(w).mean()
    total = (loss + both(loss, [w])) / both.loss_scale()
    assert both.loss_scale() == 5.0
    assert total.item() == pytest.approx((12.5 + 5 * 25 + 2 * 25) / 5)
    assert gpkit.sum(["r1"]).loss_scale() == 1.0


def test_a_state_without_a_part_leaves_that_part_at_its_beginning():
    state = gpkit.sum({"r1": {"seed": 7}}).state_dict()
    both = gpkit.sum({"r1": None, "r2": {"seed": 3}})
    both.load_state_dict(state)
    assert (both["r1"].seed, both["r2"].seed) == (7, 3)
