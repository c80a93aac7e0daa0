"""GANModule trains as a hand-written loop does."""

import copy
from functools import partial

import pytest
import torch
from gan_by_hand import (
    LOSSES,
    gp_term,
    interpolates,
    lazy_term,
    no_term,
    r1_r2_term,
    r1_term,
    train,
    weight_term,
)
from gans import R1, R2, B, assert_same, critic, data, generator, module, trainer
from torch.utils.data import DataLoader

import gpkit

EQUALS = {  # penalty, the same by hand, options of both
    "none": (None, no_term, {}),
    "gp": (lambda: gpkit.wgan_gp(5.0), gp_term, {"loss": "wasserstein"}),
    "r1": (R1, r1_term, {}),
    "lazy": (lambda: R1(every=2), lazy_term, {}),
    "sum": (lambda: gpkit.sum({"r1": {"weight": 3.0}, "r2": {"weight": 1.0}}), r1_r2_term, {}),
    "by name": (lambda: {"a": R1(), "b": R2()}, r1_r2_term, {}),
    "weight": (lambda: gpkit.weight_grad_norm(0.1), weight_term, {}),
    "every step": (R1, r1_term, {"critic_steps": 1}),
    "accumulate": (R1, r1_term, {"accumulate": 2}),
    "accumulate, lazy": (lambda: R1(every=2), lazy_term, {"accumulate": 3}),
    "conditional": (lambda: gpkit.wgan_gp(5.0), gp_term, {"conditional": True}),
    "conditional, r1": (R1, r1_term, {"conditional": True}),
    "simultaneous": (R1, r1_term, {"simultaneous": True}),
    "clip": (None, no_term, {"clip": 0.05, "loss": "wasserstein"}),
    "gradient_clip": (R1, r1_term, {"gradient_clip": 0.3}),
    "ema": (None, no_term, {"ema": 0.9}),
    "penalty steps": (R1, r1_term, {"apart": True}),
    "penalty steps, lazy": (lambda: R1(every=2), lazy_term, {"apart": True, "accumulate": 2}),
    "schedulers": (R1, r1_term, {"decay": 0.9}),
    **{loss: (None, no_term, {"loss": loss}) for loss in LOSSES},
}


@pytest.mark.parametrize("case", EQUALS)
def test_trains_as_a_hand_written_loop_does(case):
    penalty, term, options = EQUALS[case]
    options = dict(options)
    labels = 2 if options.get("conditional") else 0
    G, C = generator(labels), critic(labels)
    given = {"loss": "non_saturating", **options}
    given["penalty_steps"] = given.pop("apart", False)
    if "decay" in given:
        decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=given.pop("decay"))
        given["critic_scheduler"] = decay
        given["generator_scheduler"] = given["critic_scheduler"]
    made = module(copy.deepcopy(G), copy.deepcopy(C), penalty=penalty and penalty(), **given)
    trainer().fit(made, DataLoader(data(), B))
    points = interpolates(made.critic.seen, data().tensors[0]) if term is gp_term else []
    seen = made.generator.seen, points
    batches = [(x, y if labels else None) for x, y in DataLoader(data(), B)]
    options.pop("conditional", None)
    true_G, true_C, average = train(G, C, [batches] * 2, seen, term, **options)
    assert_same(made.generator, true_G)
    assert_same(made.critic, true_C)
    if "ema" in options:
        assert_same(made.ema_generator, average)
        assert not torch.allclose(
            average.layers[0].weight, true_G.layers[0].weight
        )  # nor is it the generator
    moved = made.generator.layers[0].weight - G.layers[0].weight
    assert moved.abs().max() > 1e-4
