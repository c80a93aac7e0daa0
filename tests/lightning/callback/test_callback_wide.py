"""Wide layers in somebody's LightningModule: their norms are taken by Gram matrices."""

import by_hand
import pytest
import torch
from fits import LAMBDA, assert_trained_as, batches, callback, fit, one_rank
from modules import SGD, Plain
from torch import nn

from gpkit.autodiff.layers import batch as layers


class Wide(nn.Module):
    """Two parts with names, with two layers that are wide compared with a batch of six."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh())
        self.head = nn.Linear(96, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


def net():
    torch.manual_seed(0)
    return Wide().double()


@pytest.fixture
def products(monkeypatch):
    """Count the layers whose norm is taken by Gram matrices."""
    counted, taken = [], layers.gram_product

    def count(left, right):
        counted.append(left.shape)
        return taken(left, right)

    monkeypatch.setattr(layers, "gram_product", count)
    return counted


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_with_wide_layers_trains_as_the_loop_by_hand(accumulate, products):
    windows = [accumulate] * (6 // accumulate)
    total = by_hand.TOTALS["weight", "exact"]
    true = by_hand.train(net(), one_rank(batches()), total, LAMBDA, SGD, windows=windows)
    made = fit(Plain(net()), callback("weight"), batches(), accumulate_grad_batches=accumulate)
    assert_trained_as(made, true)
    assert products == [(6, 96)] * 5  # the first step is an ordinary call


def test_under_autocast_the_gradient_is_taken_as_it_is(products):
    fit(Plain(net().float()), callback("weight"), [(x.float(), y) for x, y in batches(3)],
        precision="bf16-mixed")  # fmt: skip
    assert not products
