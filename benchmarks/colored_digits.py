"""Coloured digits: a colour that predicts the label in training, and misleads at test (IRM, Fishr).

    python benchmarks/colored_digits.py [seeds]     # 5 seeds if not given

The label is whether a digit is below 5, flipped in 25 % of the cases. The colour agrees with it in
80 % and 90 % of two training environments, and in 10 % of the test one. What predicts best in
training is the colour; what holds everywhere is the shape, worth at most 75 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gpkit
from gpkit.environment_penalty import EnvironmentPenalty

COPIES = 8  # of each training image, with flips and colours of their own
STEPS, JUMP, WEIGHT = 501, 190, 91257.0  # the authors' of IRM, as is the optimiser

Batch = tuple[Tensor, Tensor, Tensor]  # images [B, 128], labels [B, 1], environments [B]


def coloured(images: Tensor, digits: Tensor, agreement: float, rng: torch.Generator) -> Batch:
    """Return two-channel images of which one is zero, and noisy labels."""
    label = (digits < 5) ^ (torch.rand(len(digits), generator=rng) < 0.25)
    colour = label ^ (torch.rand(len(digits), generator=rng) >= agreement)
    channels = torch.zeros(len(images), 2, images.shape[1])
    channels[torch.arange(len(images)), colour.long()] = images
    return channels.flatten(1), label.float().unsqueeze(1), torch.zeros(len(images)).long()


def environments(seed: int) -> tuple[Batch, Batch]:
    """Return the training data, of two environments, and the test data."""
    rng = torch.Generator().manual_seed(seed)
    data = load_digits()
    order = torch.randperm(len(data.target), generator=rng)
    images = torch.as_tensor(data.data / 16, dtype=torch.float32)[order]
    digits = torch.as_tensor(data.target)[order]
    train = [t[:1297].repeat(COPIES, *[1] * (t.ndim - 1)) for t in (images, digits)]
    parts = [
        coloured(train[0][e::2], train[1][e::2], agreement, rng)
        for e, agreement in enumerate((0.8, 0.9))
    ]
    x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    env = torch.cat([part[2] + e for e, part in enumerate(parts)])
    return (x, y, env), coloured(images[1297:], digits[1297:], 0.1, rng)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in percent."""
    with torch.no_grad():
        return 100 * ((net(x) > 0) == y).float().mean().item()


def run(make: Callable[[], EnvironmentPenalty] | None, seed: int, grey: bool) -> float:
    """Train on the whole batch and return the test accuracy in percent."""
    (x, y, env), (x_test, y_test, _) = environments(seed)
    if grey:  # the oracle sees no colour
        x, x_test = (t.unflatten(1, (2, -1)).sum(1).repeat(1, 2) for t in (x, x_test))
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    for layer in net[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(net.parameters(), lr=4.898e-4)
    penalty = make() if make else None
    for _ in range(STEPS):
        logits, a = gpkit.features(net, x)
        loss = F.binary_cross_entropy_with_logits(logits, y)
        loss = loss + 1.108e-3 * sum(p.square().sum() for p in net.parameters())
        if penalty is not None:
            output = (logits, a) if penalty.name == "fishr" else logits
            loss = (loss + penalty(output, y, env)) / penalty.loss_scale()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return accuracy(net, x_test, y_test)


def annealed() -> gpkit.rescaled:
    """Return the weight: 1, then 91257 with the loss divided by it."""
    return gpkit.rescaled(gpkit.switch(1.0, WEIGHT, at=JUMP))


METHODS: dict[str, tuple[Callable[[], EnvironmentPenalty] | None, bool]] = {
    "ERM": (None, False),
    "IRM": (lambda: gpkit.irm(weight=annealed()), False),
    "IRM, halves": (lambda: gpkit.irm(weight=annealed(), halves=True), False),
    "Fishr": (lambda: gpkit.fishr(weight=annealed()), False),
    "grey oracle": (None, True),
}


def main() -> None:
    """Print each method's test accuracy, and its standard deviation over the seeds."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for name, (make, grey) in METHODS.items():
        found = [run(make, seed, grey) for seed in range(seeds)]
        spread = f" ± {stdev(found):.1f}" if seeds > 1 else ""
        print(f"{name:<12} {mean(found):.1f}{spread}", flush=True)


if __name__ == "__main__":
    main()
