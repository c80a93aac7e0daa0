"""What the tests of repeated steps share."""

import pytest

import gpkit


@pytest.fixture
def no_long_way(monkeypatch):
    """Return a function that makes the long way an error."""

    def close(*_, **__):
        raise AssertionError("the long way was taken")

    return lambda: monkeypatch.setattr(gpkit.GradientPenalty, "evaluate", close)
