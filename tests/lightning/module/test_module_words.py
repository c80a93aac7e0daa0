"""What PenalizedModule is given by mistake is told in one line, before or at the first step."""

import functools

import pytest
import torch
from torch import nn

import gpkit

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


def net(outputs=4):
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


def module(loss=None, outputs=4, **options):
    return gpkit.PenalizedModule(
        net(outputs), loss or nn.CrossEntropyLoss(), gpkit.weight_grad_norm(), **options
    )


BUILT = {
    "a class for a loss": (
        lambda: module(nn.CrossEntropyLoss),
        r"got the class CrossEntropyLoss: add parentheses",
    ),
    "a number for a loss": (
        lambda: module(3.0),
        r"must be a function \(output, y\) -> loss; got 3",
    ),
    "an optimiser": (
        lambda: module(optimizer=torch.optim.Adam(net().parameters())),
        r"must be a function of parameters, such as functools.partial\(Adam, .*; got Adam",
    ),
    "a scheduler": (
        lambda: module(
            scheduler=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(net().parameters()), 1)
        ),
        r"`scheduler=...` must be a function of an optimiser",
    ),
    "a preset": (
        lambda: gpkit.PenalizedModule(net(), nn.CrossEntropyLoss(), gpkit.r1),
        r"got the function r1: call it, r1\(\)",
    ),
    "presets": (
        lambda: gpkit.PenalizedModule(net(), nn.CrossEntropyLoss(), {"a": gpkit.r1}),
        r"got the function r1: call it, r1\(\)",
    ),
}


@pytest.mark.parametrize("kind", BUILT)
def test_refused_where_it_is_built(kind):
    build, said = BUILT[kind]
    with pytest.raises(TypeError, match=said):
        build()


def test_what_the_messages_advise_works():
    advised = module(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    assert isinstance(advised.configure_optimizers(), torch.optim.SGD)


BATCHES = {
    "labels out of range": (
        (X, torch.full((6,), 9)),
        {},
        r"for labels 0 to 3; got labels from 9 to 9: give the net an output for each class",
    ),
    "one output": (
        (X, Y),
        {"outputs": 1},
        r"the 1 outputs of the net are for labels 0 to 0; got labels from 0 to 3",
    ),
    "labels as numbers": ((X, Y.float()), {}, r"labels are class indices, y.long\(\)"),
    "a column of labels": (
        (X, Y[:, None]),
        {},
        r"for outputs \[6, 4\] and targets \[6, 1\], torch.int64",
    ),
    "other labels": ((X, Y[:4]), {}, r"for outputs \[6, 4\] and targets \[4\]"),
    "a column of outputs": (
        (X, (Y > 1).float()),
        {"loss": nn.BCEWithLogitsLoss(), "outputs": 1},
        r"give both the same shape, output.squeeze\(1\) or y\[:, None\]",
    ),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_refused_at_the_first_batch(kind):
    batch, options, said = BATCHES[kind]
    with pytest.raises(ValueError, match=said) as error:
        module(**options).penalized_loss(batch)
    assert "\n" not in str(error.value)


def test_labels_that_a_loss_ignores_are_in_range():
    y = Y.clone()
    y[0] = -100
    assert module().penalized_loss((X, y)).isfinite()
