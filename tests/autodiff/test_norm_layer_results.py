"""Norm layers in elementary operations give torch's own results, statistics and refusals."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from norms import disturbed
from torch import nn

from gpkit.autodiff.norm_layers import elementary

SHAPES = {
    "LayerNorm": [(nn.LayerNorm(4), (5, 4)), (nn.LayerNorm((3, 4)), (2, 5, 3, 4))],
    "LayerNorm, plain": [(nn.LayerNorm(4, elementwise_affine=False), (4,))],
    "LayerNorm, no samples": [(nn.LayerNorm(4), (0, 4))],
    "RMSNorm": [(nn.RMSNorm(4), (5, 4)), (nn.RMSNorm((3, 4), eps=0.3), (2, 3, 4))],
    "BatchNorm": [(nn.BatchNorm1d(3), (5, 3)), (nn.BatchNorm1d(3), (5, 3, 4))],
    "BatchNorm, images": [(nn.BatchNorm2d(3), (2, 3, 4, 2)), (nn.BatchNorm3d(3), (2, 3, 2, 2, 2))],
    "BatchNorm, one sample": [(nn.BatchNorm2d(3), (1, 3, 4, 2))],
    "BatchNorm, cumulative": [(nn.BatchNorm1d(3, momentum=None), (5, 3))],
    "BatchNorm, no affine": [(nn.BatchNorm1d(3, affine=False, momentum=0.7), (5, 3))],
    "BatchNorm, no statistics": [(nn.BatchNorm1d(3, track_running_stats=False), (5, 3))],
    "InstanceNorm": [(nn.InstanceNorm1d(3), (5, 3, 4)), (nn.InstanceNorm2d(3), (3, 4, 2))],
    "InstanceNorm, statistics": [
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (5, 3, 4, 2))
    ],
}

FORMATS = {
    "float64": (torch.float64, nullcontext),
    "float32": (torch.float32, nullcontext),
    "bfloat16": (torch.bfloat16, nullcontext),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
    "bfloat16 under autocast": (
        torch.bfloat16,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_results_and_statistics_are_torchs(name, training, form):
    dtype, context = FORMATS[form]
    for layer, shape in SHAPES[name]:
        fused = disturbed(copy.deepcopy(layer)).train(training)
        if form != "bfloat16 under autocast":
            fused = fused.to(dtype)
        written = copy.deepcopy(fused)
        if isinstance(layer, nn.RMSNorm) and "under" in form:
            continue  # torch warns of what it does there
        for step in range(2):
            x = (torch.randn(shape) * 3 + 2 + step).to(dtype)
            with context():
                expected = fused(x)
                with elementary():
                    found = written(x)
            assert found.dtype == expected.dtype
            # torch's bfloat16 batch norm on a CPU rounds w x / √v before it takes m from it
            close = {"rtol": 1.6e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
            torch.testing.assert_close(found, expected, **close)
            torch.testing.assert_close(written.state_dict(), fused.state_dict())


def test_float32_accuracy_far_from_zero():
    # a variance taken as E x² - (E x)² would be noise here
    x = torch.randn(5, 64) + 1000
    with elementary():
        found = F.layer_norm(x, (64,))
    torch.testing.assert_close(
        found.double(), F.layer_norm(x.double(), (64,)), rtol=1e-3, atol=1e-3
    )


def test_native_functions_give_their_statistics_too():
    x, w = torch.randn(5, 3).double(), torch.rand(3).double()
    for call in (
        lambda: torch.native_layer_norm(x, [3], w, w, 0.1),
        lambda: torch.native_batch_norm(x, w, w, None, None, True, 0.1, 0.1),
    ):
        with elementary():
            found = call()
        torch.testing.assert_close(found, call())


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.layer_norm(torch.zeros(2, 3), (4,)),
        lambda: F.layer_norm(torch.zeros(2, 3), (3,), torch.ones(2)),
        lambda: F.layer_norm(torch.zeros(2, 3), ()),
        lambda: F.batch_norm(torch.zeros(1, 3), None, None, training=True),
        lambda: F.batch_norm(torch.zeros(4, 3), None, None, training=True, eps=0.0),
        lambda: F.batch_norm(torch.zeros(4, 3), torch.zeros(2), torch.ones(2), training=True),
        lambda: F.instance_norm(torch.zeros(2, 3, 1)),
        lambda: F.rms_norm(torch.zeros(2, 3), (4,)),
    ],
)
def test_torchs_own_refusals(call):
    with pytest.raises((RuntimeError, ValueError)) as fused:
        call()
    with elementary(), pytest.raises(fused.type) as written:
        call()
    assert str(written.value) == str(fused.value)


def test_statistics_do_not_spoil_graphs_that_saved_them():
    # torch's kernel writes to them without a new version, or this backward would fail
    layer, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    loss = layer.eval()(x).square().sum()
    with elementary():
        layer.train()(x)
    loss.backward()
    assert layer.weight.grad is not None
