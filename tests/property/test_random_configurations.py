"""Random choices on all axes at once equal the formula, written out in `torch.func`."""

import random
from itertools import islice

import pytest

from tests.property import breaks
from tests.property.check import REFUSALS, check, kind_of
from tests.property.config import Config, draw, parse

NUMBER = 150


@pytest.mark.parametrize("seed", range(3))
def test_value_norms_and_parameter_gradient(seed):
    rng = random.Random(f"suite {seed}")
    found = [(c, check(c)) for c in (draw(rng) for _ in range(NUMBER // 3))]
    same = [c for c, outcome in found if outcome.kind == "same"]
    assert len(same) > NUMBER // 3 * 0.6
    for c, outcome in found:
        known = any(text in kind_of(outcome.message) for text in REFUSALS)
        assert outcome.kind != "refused" or known, f"{outcome.message}\n{c!r}"


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
    known = any(text in kind_of(outcome.message) for text in REFUSALS)
    return outcome.kind == "refused" and not known


@pytest.mark.parametrize("name", breaks.BREAKS)
def test_a_break_is_noticed(name):
    """Among the first sixty configurations that the break concerns."""
    rng = random.Random("suite 0")
    concerned = (c for c in iter(lambda: draw(rng), None) if breaks.BREAKS[name].concerns(c))
    with breaks.broken(name):
        assert any(notices(c) for c in islice(concerned, 60)), f"nothing noticed it: {name}"
