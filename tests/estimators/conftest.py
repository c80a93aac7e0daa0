"""What the tests of repeated steps share."""

import pytest

import gpkit


@pytest.fixture
def no_long_way(monkeypatch):
    """Return a function that makes the long way an error."""

    def close(*_, **__):
        raise AssertionError("the long way was taken")

    return lambda: monkeypatch.setattr(gpkit.GradientPenalty, "evaluate", close)


@pytest.fixture
def long_way(monkeypatch):
    """Return a list with an entry for each step that takes the long way."""
    taken, evaluate = [], gpkit.GradientPenalty.evaluate

    def counting(self, *args, **kwargs):
        taken.append(1)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(gpkit.GradientPenalty, "evaluate", counting)
    return taken
