"""The net that the monitor's tests look into."""

import nets
import pytest


@pytest.fixture
def net():
    return nets.net()
