"""The monitor's histograms in a TensorBoard file."""

import copy

import pytest
import torch
import torch.nn.functional as F
from modules import Plain
from monitored import (
    ALL,
    BATCHES,
    B,
    Validated,
    approx,
    fit,
    histograms,
    norms_of_samples,
    seen_by_hand,
    size,
)
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpkit


@pytest.mark.parametrize("every", [0, 2])
def test_histograms(net, tmp_path, every):
    monitor = gpkit.GradientNormMonitor("layer", **ALL, histogram_every_n_epochs=every)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = Validated(copy.deepcopy(net))
    fit(module, monitor, logger=logger, max_epochs=3)
    found = histograms(tmp_path)
    if not every:
        assert not found
        return
    events = EventAccumulator(str(tmp_path)).Reload()
    true = seen_by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=3)
    assert [e.value for e in events.Scalars("grad_norm/weight")] == approx(true)
    samples = seen_by_hand(net, lambda net, x, y: norms_of_samples(net, x, y, "input"), epochs=3)
    first, last = found["grad_norm/input/histogram"]
    assert (first.step, last.step) == (BATCHES, 3 * BATCHES)
    for one, true in [(first, samples[:BATCHES]), (last, samples[2 * BATCHES :])]:
        value, true = one.histogram_value, torch.cat(true)
        assert value.num == BATCHES * B
        assert value.sum == approx(true.sum().item())
        assert value.max == approx(true.max().item())

    def entries(net, x, y):
        return torch.cat([p.grad.flatten() for p in net.head.parameters()])

    first, last = found["grad/weight/net.head/histogram"]
    assert (first.step, last.step) == (0, 2 * BATCHES)
    seen = seen_by_hand(net, entries, epochs=3)
    for one, true in [(first, seen[0]), (last, seen[2 * BATCHES])]:
        assert one.histogram_value.num == len(true)
        assert one.histogram_value.sum_squares == approx(true.square().sum().item())
    weights = {f"grad/weight/{name}/histogram" for name in ["net.head", "net.backbone.0"]}
    samples = {f"grad_norm/{n}/histogram" for n in ["input", "activation/net.backbone"]}
    assert set(found) == weights | samples | {f"val/{name}" for name in samples}
    assert [h.histogram_value.num for h in found["val/grad_norm/input/histogram"]] == [12, 12]


def test_histograms_leave_out_what_is_not_finite(net, tmp_path):
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            factor = torch.tensor([1.0, float("inf"), 1.0, float("nan")], dtype=x.dtype)
            return F.cross_entropy(self.net(x) * factor[:, None], y, reduction="none")[::2].mean()

    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = gpkit.GradientNormMonitor("layer", inputs="net")
    fit(Broken(copy.deepcopy(net)), monitor, logger=logger, max_steps=1)
    found = histograms(tmp_path)
    assert set(found) == {"grad_norm/input/histogram"}  # no gradient of a weight is finite
    assert found["grad_norm/input/histogram"][0].histogram_value.num == 2
