"""Random choices on all axes at once equal the formula, written out in `torch.func`."""

import random
from itertools import islice

import pytest

from tests.property import breaks
from tests.property.check import check, followed
from tests.property.config import Config, draw, parse
from tests.property.refusals import refusal

NUMBER = 150


@pytest.mark.parametrize("seed", range(3))
def test_value_norms_and_parameter_gradient(seed):
    rng = random.Random(f"suite {seed}")
    found = [(c, check(c)) for c in (draw(rng) for _ in range(NUMBER // 3))]
    same = [c for c, outcome in found if outcome.kind == "same"]
    assert len(same) > NUMBER // 3 * 0.6
    for c, outcome in found:
        assert outcome.kind != "refused" or refusal(outcome.message), f"{outcome.message}\n{c!r}"
        end = followed(c, outcome)  # the advice of the refusals
        assert end.kind != "refused" or not refusal(end.message).advice


def test_a_printed_configuration_can_be_pasted():
    rng = random.Random(0)
    for _ in range(50):
        c = draw(rng)
        assert parse(repr(c)) == c
    assert repr(Config()) == "Config()"


def notices(c):
    try:
        outcome = check(c)
    except AssertionError:
        return True
    return outcome.kind == "refused" and not refusal(outcome.message)


@pytest.mark.parametrize("name", breaks.BREAKS)
def test_a_break_is_noticed(name):
    """Among the first sixty configurations that the break concerns."""
    rng = random.Random("suite 0")
    concerned = (c for c in iter(lambda: draw(rng), None) if breaks.BREAKS[name].concerns(c))
    with breaks.broken(name):
        assert any(notices(c) for c in islice(concerned, 60)), f"nothing noticed it: {name}"
