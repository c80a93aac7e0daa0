"""The gradient of the critic's loss by layer, against the chain rule written out."""

import math

import pytest
import torch
from torch import nn

from gpkit.lightning.gan.figures.layers import CriticLayers, by_layer


def test_it_is_the_chain_rule():
    # catches layers in the wrong order, a mean over both sets together, and a lost sign
    torch.manual_seed(0)
    a, b = nn.Linear(3, 5), nn.Linear(5, 1)
    critic = nn.Sequential(a, nn.Tanh(), b).double()
    real, fake = torch.randn(4, 3).double(), torch.randn(6, 3).double()
    signs = torch.cat([torch.full((4,), -1 / 4), torch.full((6,), 1 / 6)]).double()[:, None]
    slopes = 1 - a(torch.cat([real, fake])).tanh().square()
    expected = [(signs @ b.weight * slopes).norm(), signs.norm()]
    torch.testing.assert_close(by_layer(critic, real, fake), expected)
    assert not any(m._forward_hooks for m in critic.modules())


def test_a_vanishing_gradient_is_not_zero():
    # catches a norm in float32, whose squares are zero below 1e-23
    critic = nn.Sequential(nn.Linear(2, 128, bias=False), nn.Linear(128, 1, bias=False))
    nn.init.constant_(critic[1].weight, 1e-25)
    first, _ = by_layer(critic, torch.zeros(128, 2), torch.zeros(128, 2))
    assert first.item() == pytest.approx(1e-25 * math.sqrt(2 * 128 * 128) / 128, rel=1e-5, abs=0)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match=r"`CriticLayers\(samples=.*>= 1; got 0"):
        CriticLayers(0)
