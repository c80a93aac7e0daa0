"""A sum is its parts: values, gradients, steps, states and names."""

import copy
import pickle

import pytest
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
        ({"r1": {"wieght": 1.0}}, TypeError, "unexpected keyword argument 'wieght'"),
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
