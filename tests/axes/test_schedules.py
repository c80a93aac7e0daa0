"""Schedules are functions of the step, and a lazy penalty is the plain one on average."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpkit

examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)
weights, steps = st.floats(0, 1e4), st.integers(1, 1000)


def slope(x):  # n² = 9 everywhere
    return 3 * x[:, 0]


@examples
@given(weight=weights, n=steps, t=st.integers(0, 2000))
def test_closed_forms(weight, n, t):
    assert gpkit.warmup(weight, steps=n)(t) == pytest.approx(weight * min((t + 1) / n, 1))
    half = math.cos(math.pi * min(t / n, 1) / 2) ** 2  # (1 + cos 2a) / 2 = cos² a
    assert gpkit.cosine(weight, steps=n, end=2.0)(t) == pytest.approx(2 + (weight - 2) * half)
    assert gpkit.switch(weight, 7.0, at=n)(t) == (weight if t < n else 7.0)


@pytest.mark.parametrize(
    "schedule",
    [gpkit.warmup(5.0, steps=8), gpkit.cosine(5.0, steps=8, end=1.0), gpkit.switch(5.0, 1.0, at=8)],
    ids=lambda schedule: type(schedule).__name__,
)
def test_monotone_within_its_ends(schedule):
    values = [schedule(t) for t in range(20)]
    assert values in (sorted(values), sorted(values, reverse=True))
    assert values[8:] == values[8:9] * 12
    assert 0 < min(values) < max(values) == 5.0
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_a_penalty_follows_its_schedule():
    x = torch.zeros(4, 2)
    penalty = gpkit.input_grad_norm(weight=lambda step: step / 2)
    assert [penalty(slope, x).item() for _ in range(4)] == [0.0, 4.5, 9.0, 13.5]
    assert penalty(slope, x, step=10) == 45  # the step of the optimiser, where it is given
    assert penalty(slope, x) == 49.5  # and the count goes on from there


@pytest.mark.parametrize("every", [1, 2, 5])
def test_lazy_is_the_plain_one_on_average(every):
    # catches a forgotten factor k, a first step that is skipped, and evaluations in between
    x, evaluated = torch.zeros(4, 2), []

    def f(x):
        evaluated.append(step)
        return slope(x)

    penalty = gpkit.input_grad_norm(weight=0.5, every=every)
    values = []
    for step in range(10):
        values.append(penalty(f, x).item())
        assert penalty.weight_at(step) == (0 if step % every else 0.5 * every)
    assert sum(values) / 10 == 0.5 * 9
    assert evaluated == list(range(0, 10, every))
    assert values == [4.5 * every if step in evaluated else 0.0 for step in range(10)]


def test_the_step_that_is_given_decides():
    x, penalty = torch.zeros(4, 2), gpkit.input_grad_norm(weight=1.0, every=4)
    given_steps = (0, 3, 4, 5, 8, 2)
    found = [penalty(slope, x, step=step).item() for step in given_steps]
    assert found == [36, 0, 36, 0, 36, 0]


def test_schedule_sees_the_optimiser_step_of_a_lazy_penalty():
    penalty = gpkit.input_grad_norm(weight=lambda step: 1.0 + step, every=3)
    assert [penalty.weight_at(t) for t in range(7)] == [3, 0, 0, 12, 0, 0, 21]


def test_terms_act_on_every_step_and_count_none():
    x, penalty = torch.zeros(4, 2), gpkit.input_grad_norm(weight=0.5, every=4)
    for step in (None, 0, 1, 2, 3, 4):
        terms = penalty.terms(slope, x, step=step)
        assert terms.weight == 2
        assert terms.penalty == 18
    assert penalty.step == 0


def test_a_weight_of_zero_evaluates_nothing():
    def fail(x):
        raise AssertionError

    x = torch.zeros(4, 2)
    for weight in (0.0, gpkit.switch(0.0, 1.0, at=9)):
        value = gpkit.input_grad_norm(weight=weight)(fail, x)
        assert value == 0
        assert value.shape == ()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gpkit.warmup(-1.0, steps=4), r"`warmup\(weight=...\)` must be a number >= 0"),
        (lambda: gpkit.warmup(1.0, steps=0), r"`warmup\(steps=...\)` must be an integer >= 1"),
        (lambda: gpkit.cosine("1", steps=4), r"`cosine\(weight=...\)` must be a number >= 0"),
        (lambda: gpkit.cosine(1.0, steps=4.0), r"`cosine\(steps=...\)` must be an integer"),
        (lambda: gpkit.cosine(1.0, steps=4, end=math.nan), r"`cosine\(end=...\)`.*got nan"),
        (lambda: gpkit.switch(math.inf, 1.0, at=4), r"`switch\(before=...\)`.*got inf"),
        (lambda: gpkit.switch(1.0, True, at=4), r"`switch\(after=...\)`.*got True"),
        (lambda: gpkit.switch(1.0, 1.0, at=-1), r"`switch\(at=...\)` must be an integer >= 0"),
        (lambda: gpkit.r1(every=0), r"`every=...` must be an integer >= 1; got 0"),
        (lambda: gpkit.r1(every=2.0), r"`every=...` must be an integer >= 1; got 2\.0"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()
