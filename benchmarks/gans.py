"""What the gradient penalty does for a GAN: the modes that are covered, of 25 Gaussians and of 8.

WGAN-GP and the plain, non-saturating GAN have the same nets, optimiser and steps. The samples are
those of the generator as it is after the last step, and those of its average over steps.

    python benchmarks/gans.py                 3 seeds; half an hour; writes gans.png and gans.md
    python benchmarks/gans.py --runs FOLDER   keeps the runs, and takes those that are there already
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
from datetime import date
from pathlib import Path
from tempfile import mkdtemp

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import gpkit
from gpkit.data import EightGaussians, TwentyFiveGaussians
from gpkit.lightning.gan.figures.coverage import modes_covered
from gpkit.lightning.gan.figures.drawings import DATA, SAMPLES, Box, box_around, surface
from gpkit.models import PointCritic, PointGenerator

HERE = Path(__file__).resolve().parent
DATA_SETS = {"25": TwentyFiveGaussians, "8": EightGaussians}
PLAIN = ("module.loss=non_saturating", "penalty=none")
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "WGAN-GP": {"25": ("wgan_gp_25gaussians",), "8": ("wgan_gp_8gaussians",)},
    "plain GAN": {"25": ("gan_25gaussians",), "8": ("wgan_gp_8gaussians", *PLAIN)},
}
SAMPLE = 2500


def trained(options: tuple[str, ...], seed: int, folder: Path) -> dict[str, torch.Tensor]:
    """Return the parameters after a run, which is made unless it is there."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not (folder / "metrics.json").is_file():
        experiment, *others = options
        words = [f"experiment={experiment}", *others, f"seed={seed}"]
        with contextlib.redirect_stdout(io.StringIO()):
            gpkit.train([*words, "device=cpu", "trainer.enable_progress_bar=false"], folder)
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def part(net: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str) -> torch.nn.Module:
    """Return a net with its part of a module's parameters."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    net.load_state_dict(own)
    return net.requires_grad_(False)


def draw(axes: Axes, critic: torch.nn.Module, data: torch.Tensor, samples: torch.Tensor) -> None:
    """Draw the critic's values, the data and the samples."""
    box: Box = box_around(data)
    left, right, bottom, top = box
    values = surface(critic, box).numpy()
    x = torch.linspace(left, right, len(values)), torch.linspace(bottom, top, len(values))
    axes.contourf(*x, values, levels=24, cmap="PuBu", alpha=0.8)
    axes.contour(*x, values, levels=24, colors="white", linewidths=0.4, linestyles="-")
    axes.plot(*data.T, ".", color=DATA, ms=3, mew=0, alpha=0.6, label="data")
    axes.plot(*samples.T, ".", color=SAMPLES, ms=2.5, mew=0, alpha=0.6, label="samples")
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])


def told(values: list[float], digits: int = 1) -> str:
    """Return the mean of several values, and the values."""
    listed = ", ".join(f"{value:g}" for value in values)
    return f"**{statistics.fmean(values):.{digits}f}** ({listed})"


def main() -> None:
    """Run everything, print and write the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=None)
    arguments = parser.parse_args()
    runs = arguments.runs or Path(mkdtemp())
    torch.set_num_threads(1)

    figure, axes = plt.subplots(2, 2, figsize=(8, 8.2), layout="constrained")
    rows = [
        "| Gaussians | method | modes, last step | of high quality | modes, average "
        "| of high quality |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, (number, make) in enumerate(DATA_SETS.items()):
        for column, (method, experiments) in enumerate(METHODS.items()):
            counts: dict[str, list[float]] = {"generator.": [], "ema_generator.": []}
            shares: dict[str, list[float]] = {"generator.": [], "ema_generator.": []}
            for seed in range(arguments.seeds):
                options = experiments[number]
                name = f"{'gan' if method == 'plain GAN' else 'wgan_gp'}_{number}gaussians_{seed}"
                state = trained(options, seed, runs / name)
                data = make(seed=seed, val_size=0)
                data.setup("fit")
                z = torch.randn(SAMPLE, 2, generator=torch.Generator().manual_seed(1))
                for prefix in counts:
                    samples = part(PointGenerator(2, (2,)), state, prefix)(z)
                    found = modes_covered(samples, data.modes, data.std)
                    counts[prefix].append(found.covered)
                    shares[prefix].append(round(100 * found.high_quality))
                if seed == 0:
                    critic = part(PointCritic((2,)), state, "critic.")
                    points = data.train_set.tensors[0][:SAMPLE]
                    draw(axes[row, column], critic, points, samples)
                    axes[row, column].set_title(
                        f"{method}: {found.covered} of {number} modes", fontsize=11
                    )
            cells = [f"{told(counts[p])} | {told(shares[p], 0)} %" for p in counts]
            rows.append(f"| {number} | {method} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)

    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=4)
    figure.savefig(HERE / "gans.png", dpi=90)
    write(rows)


def write(rows: list[str]) -> None:
    """Put the table of today between the marks of gans.md, whose words stay as they are."""
    page = HERE / "gans.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    table = "\n".join([f"{date.today()}, `python benchmarks/gans.py`:", "", *rows])
    page.write_text(f"{before}<!-- table -->\n{table}\n<!-- end -->\n{after}")


if __name__ == "__main__":
    main()
