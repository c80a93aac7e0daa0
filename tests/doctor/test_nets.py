"""Nets with attention and recurrent layers take every penalty, in training and in eval mode."""

import pytest
import torch
from torch import nn

import gpkit
from gpkit.models import ViT
from gpkit.presets import PRESETS

B = 6

# What a call needs beside the samples, or a choice that the preset leaves to the user.
CHOICES = {
    "wgan_lp": {"of": lambda y: y.sum(1), "center": 1e-3},  # smaller slopes cost nothing
    "contractive": {"activation": "blocks.0"},
    "eikonal": {"of": lambda y: y.sum(1)},
    "sobolev": {"of": lambda y: y.sum(1)},
    "amp": {"of": lambda y: y.sum(1)},
    "path_length": {"estimator": "exact", "of": lambda y: y.sum(1)},
}
CRITICS = ("wgan_gp", "wgan_lp", "dragan", "zero_gp", "wgan_div", "max_gp", "r1", "r2", "r1_r2")
CRITICS += ("approximate_r1", "approximate_r2")


def images():
    return torch.randn(B, 1, 8, 8), torch.arange(B) % 3


def built(name):
    choices = CHOICES.get(name, {"of": lambda y: y.sum(1)} if name in CRITICS else {})
    weight = {} if name in ("gnp", "sam") else {"weight": 0.1}
    return PRESETS[name](**weight, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [n for n in PRESETS if n != "none"])
def test_a_vision_transformer_takes_every_preset(name, training):
    torch.manual_seed(0)
    net = ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=1, heads=2).train(training)
    x, y = images()
    given = {"sobolev": {"target": torch.randn_like(x)}, "right_reasons": {"metric": x > 0}}
    penalty = built(name)
    options = {"loss": nn.CrossEntropyLoss(reduction="none"), "fake": x.flip(0), "costs": False}
    report = gpkit.diagnose(net, penalty, (x, y), **options, **given.get(name, {}))
    assert report.ok, str(report)
    numbers = report.numbers[penalty.name]
    assert numbers["norm of its gradient"] > 0
    assert len(numbers["trains"]) > 10
