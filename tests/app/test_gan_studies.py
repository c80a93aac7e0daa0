"""What studies of critics have published, through the application: slow, but for the formulas."""

import math

import pytest
import torch
from torch import nn

import gpkit
from gpkit.data import SwissRoll
from gpkit.models import PointCritic, PointGenerator

pytestmark = pytest.mark.app

QUIET = ["device=cpu", "trainer.enable_progress_bar=false"]
slow = pytest.mark.slow
CLIPPING, PENALTY = "experiment=critic_clipping", "experiment=critic_penalty"


def first_and_last(folder):
    """Return ‖∂L/∂h‖ of L = E D(y) - E D(x) in the outputs of the first and the last linear layer.

    By the chain rule written out, and in float64.
    """
    generator, critic = PointGenerator(2, (2,), width=512), PointCritic((2,), depth=11)
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, net in (("generator", generator), ("critic", critic)):
        start = name + "."
        net.load_state_dict({k[len(start) :]: v for k, v in state.items() if k.startswith(start)})
    data = SwissRoll(n=128, val_size=0, test_size=0, seed=7)
    data.setup("fit")
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        fake = generator(torch.randn(128, 2, generator=rng))
        h = torch.cat([data.train_set.tensors[0], fake]).double()
        layers = [layer.double() for layer in critic.modules() if isinstance(layer, nn.Linear)]
        assert len(layers) == 12
        active = []
        for layer in layers[:-1]:
            h = h @ layer.weight.T + layer.bias
            active.append(h > 0)
            h = h.clamp(min=0)
        grad = torch.full((256, 1), 1 / 128, dtype=torch.float64)
        grad[:128] *= -1
        last = grad.norm().item()
        for layer, on in zip(layers[:0:-1], active[::-1], strict=True):
            grad = (grad @ layer.weight) * on
    return grad.norm().item(), last


@slow
@pytest.mark.parametrize(
    ("overrides", "low", "high"),
    [
        ([CLIPPING, "module.clip=0.1"], 0.03, 100),  # published: 8.1
        ([CLIPPING], 1e-14, 1e-12),  # 6.8e-14
        ([CLIPPING, "module.clip=0.001"], 1e-27, 1e-22),  # whose square is 0 in float32
        ([PENALTY], 0.01, 1.0),  # 0.18
    ],
    ids=["clip 0.1", "clip 0.01", "clip 0.001", "wgan_gp"],
)
def test_clipping_explodes_or_vanishes_and_the_penalty_does_neither(overrides, low, high, tmp_path):
    gpkit.train([*overrides, *QUIET], tmp_path)
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert state["gpkit_gan"]["critic"] == 750
    assert state["gpkit_gan"]["generator"] == 150
    first, last = first_and_last(tmp_path)
    assert low < first < high
    assert last == pytest.approx(math.sqrt(2 / 128))


@slow
@pytest.mark.parametrize(
    ("weight", "raw", "distance"), [(10.0, (2.2, 0.03), (2, 0.02)), (0.1, (22, 0.7), (2, 0.03))]
)
def test_a_distance_with_a_known_answer(weight, raw, distance, tmp_path):
    metrics = gpkit.train(
        ["experiment=wasserstein_gaussians", f"penalty.weight={weight}", *QUIET], tmp_path
    )
    assert metrics["test/wasserstein/raw"] == pytest.approx(raw[0], abs=raw[1])
    assert metrics["test/wasserstein/debiased"] == pytest.approx(distance[0], abs=distance[1])
    assert metrics["slope/interpolates"] == pytest.approx(1 + 1 / weight, rel=0.03)
