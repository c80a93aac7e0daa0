"""Clipped weights against a penalty: the gradient by layer of a deep critic.

Gulrajani et al. (2017), figure 1b: a Swiss roll, a critic of 12 linear layers of width 128. What is
measured is ‖∂L/∂h‖ of L = E D(y) - E D(x) on 128 + 128 samples, h the outputs of a linear layer,
after 150 steps of the generator. At layer 12 it is √(2/128) = 0.125 whatever the critic is.

    python benchmarks/critic_clipping.py       3 seeds, three minutes; writes the .png and .md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from runs import run
from torch import Tensor, nn

from gpkit.data import SwissRoll
from gpkit.models import PointCritic, PointGenerator

HERE = Path(__file__).resolve().parent
CLIPPING, SAMPLES = "experiment=critic_clipping", 128
VARIANTS = {  # what is on the command line, the published norms of layers 1 and 12, a colour
    "clip 0.1": ([CLIPPING, "module.clip=0.1"], "8.1, 0.12", "#fc8d59"),
    "clip 0.01": ([CLIPPING], "6.8e-14, 0.12", "#d7301f"),
    "clip 0.001": ([CLIPPING, "module.clip=0.001"], "0, 0.12", "#7f0000"),
    "neither": ([CLIPPING, "module.clip=null"], "", "#888888"),
    "WGAN-GP": (["experiment=critic_penalty"], "0.18, 0.12", "#2171b5"),
}

Norms = list[float]


def nets(folder: Path) -> tuple[PointGenerator, PointCritic]:
    """Return the nets of a run as it left them."""
    pair = PointGenerator(2, (2,), width=512), PointCritic((2,), depth=11)
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, net in zip(("generator", "critic"), pair, strict=True):
        start = name + "."
        net.load_state_dict({k[len(start) :]: v for k, v in state.items() if k.startswith(start)})
    return pair


def gradients(critic: nn.Module, real: Tensor, fake: Tensor) -> list[Tensor]:
    """Return the gradient of the critic's loss in the outputs of each linear layer, [2 B, F]."""
    outputs: list[Tensor] = []
    layers = [layer for layer in critic.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda _, x, h: outputs.append(h)) for layer in layers]
    of_real, of_fake = critic(torch.cat([real, fake])).split(len(real))
    for hook in hooks:
        hook.remove()
    return list(torch.autograd.grad(of_fake.mean() - of_real.mean(), outputs))


def by_layer(folder: Path, seed: int) -> tuple[Norms, Norms, list[float]]:
    """Return the norms by layer, taken in float64, and in float32, and the critic's weights."""
    generator, critic = nets(folder)
    data = SwissRoll(n=SAMPLES, val_size=0, test_size=0, seed=1000 + seed)
    data.setup("fit")
    z = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(seed))
    grads = gradients(critic, data.train_set.tensors[0], generator(z).detach())
    weights = torch.cat([p.detach().flatten() for p in critic.parameters() if p.dim() > 1])
    doubles = [g.double().norm().item() for g in grads]
    return doubles, [g.norm().item() for g in grads], weights.tolist()


def measured(overrides: list[str], seed: int) -> tuple[Norms, Norms, list[float], float]:
    """Train once; return norms by layer, in float64 and float32, the weights, and the slope."""
    with TemporaryDirectory() as folder:
        metrics = run([*overrides, f"seed={seed}"], Path(folder))
        return *by_layer(Path(folder), seed), metrics["slope/interpolates"]


def main() -> None:
    """Run every variant with every seed, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    rows = [
        "| critic | layers 1, 12: published | layer 1, by seed | layer 12 "
        "| layer 1, squares in float32 | slope, by seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (overrides, published, color) in VARIANTS.items():
        found = [measured(overrides, seed) for seed in range(seeds)]
        for seed, (norms, *_) in enumerate(found):
            label = None if seed else name
            for axes in (left, middle):
                axes.semilogy(range(1, 13), norms, ".-", color=color, lw=1, ms=4, label=label)
        if name in ("clip 0.01", "WGAN-GP"):
            right.hist(found[0][2], 80, range=(-0.2, 0.2), color=color, alpha=0.7, label=name)
        doubles, floats, _, slopes = zip(*found, strict=True)
        columns = [
            published,
            listed(norms[0] for norms in doubles),
            f"{doubles[0][-1]:.3f}",
            listed(norms[0] for norms in floats),
            listed(slopes),
        ]
        rows.append(f"| {name} | {' | '.join(columns)} |")
        print(rows[-1], flush=True)

    left.set(xlabel="layer", title="gradient of the critic's loss, by layer")
    middle.set(xlabel="layer", title="of these, the large ones", ylim=(0.01, 100))
    right.set(xlabel="weight", yscale="log", title="the critic's weights, seed 0")
    for axes in (left, middle):
        axes.set_xticks(range(1, 13))
    for axes in (left, right):
        axes.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "critic_clipping.png", dpi=110)
    dated = f"{date.today():%Y-%m-%d}, `python benchmarks/critic_clipping.py`, seeds from 0 on."
    (HERE / "critic_clipping.md").write_text("\n".join([dated, "", *rows]) + "\n")


def listed(numbers: Iterable[float]) -> str:
    """Return numbers with two digits each."""
    return ", ".join(f"{number:.2g}" for number in numbers)


if __name__ == "__main__":
    main()
