"""The figures of the README, of the runs that ``python -m gpkit.reproduce`` has made.

python benchmarks/figures.py reproduced      # seconds; the .png of all runs there are
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from gpkit.app.jobs import results_in
from gpkit.app.result import Result
from gpkit.data import EightGaussians, TwentyFiveGaussians
from gpkit.lightning.gan.figures.drawings import DATA, SAMPLES, Box, box_around, surface
from gpkit.models import PointCritic, PointGenerator

HERE = Path(__file__).resolve().parent
GREY, BLUE = "#888888", "#2171b5"


class MissingError(Exception):
    """There is no finished run of a row."""


def runs(place: Path, row: str) -> dict[Path, Result]:
    """Return the finished runs of a row, the first seed first."""
    folder = place / "runs" / row
    found = {folder / n: r for n, r in results_in(folder).items() if r.status == "finished"}
    if not found:
        raise MissingError(row)
    return found


def logged(folder: Path, *names: str) -> list[list[float]]:
    """Return the steps at which a run has logged the first name, and the values of every name."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = [events.Scalars(name) for name in names]
    return [[s.step for s in found[0]], *([s.value for s in scalars] for scalars in found)]


def state_of(folder: Path, part: str) -> dict[str, Tensor]:
    """Return the parameters of a part of a module after a run."""
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    start = f"{part}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def bare(figure: Figure) -> Figure:
    """Take away the frames."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def label_noise(place: Path) -> Figure:
    """Draw the gradient norm in training, and the accuracy at test, for each weight."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    weights = {"none": GREY, "0.1": "#9ecae1", "0.3": "#6baed6", "1": BLUE, "2": "#08306b"}
    for x, (weight, color) in enumerate(weights.items()):
        found = runs(place, f"label_noise/{weight}")
        steps, norms = logged(next(iter(found)), "grad_norm/weight")
        smooth = [statistics.fmean(norms[max(0, i - 4) : i + 1]) for i in range(len(norms))]
        label = "no penalty" if weight == "none" else f"λ = {weight}"
        left.plot(steps, smooth, color=color, label=label, lw=1.8)
        accuracies = [100 * (r.metrics["test/acc"] or 0) for r in found.values()]
        right.bar(x, statistics.fmean(accuracies), color=color)
        right.plot([x] * len(accuracies), accuracies, "o", color="black", ms=3, zorder=3)
        mean = f"{statistics.fmean(accuracies):.1f}"
        right.text(x, 52, mean, ha="center", color="white", fontweight="bold")
    left.set(xlabel="step", ylabel="grad_norm/weight", yscale="log", title="‖∇L‖, as logged")
    left.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    left.minorticks_off()
    left.legend(fontsize=8, ncols=2)
    right.set(ylim=(50, 100), title="accuracy on clean test labels, %")
    right.set_xticks(range(len(weights)), [w.replace("none", "0") for w in weights])
    right.set_xlabel("λ, the weight of ‖∇L‖²")
    return bare(figure)


def dirac_gan(place: Path) -> Figure:
    """Draw the trajectories, and the distance from the equilibrium."""
    figure, (*planes, distances) = plt.subplots(
        1, 5, figsize=(15, 3.2), width_ratios=(1, 1, 1, 1, 1.5)
    )
    variants = {
        "none": ("no penalty", GREY),
        "wgan_gp": ("WGAN-GP, 0.7", "#d95f02"),
        "r1_0.3": ("R1, γ 0.3", "#6baed6"),
        "r1_1": ("R1, γ 1", "#08306b"),
    }
    for (row, (name, color)), plane in zip(variants.items(), planes, strict=True):
        folder = next(iter(runs(place, f"dirac_gan/{row}")))
        steps, theta, psi = logged(folder, "dirac/theta", "dirac/psi")
        plane.plot([1, *theta], [1, *psi], "-", color=color, lw=0.8)
        plane.plot([1, *theta], [1, *psi], ".", color=color, ms=3)
        plane.plot(1, 1, "o", color="black", ms=5)
        plane.plot(0, 0, "+", color="black", ms=9)
        plane.set(title=name, xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xlabel="θ", aspect="equal")
        distances.semilogy(steps, list(map(math.hypot, theta, psi)), color=color, label=name)
    planes[0].set_ylabel("ψ")
    distances.set(xlabel="step", title="distance from the equilibrium")
    distances.legend(fontsize=8)
    return bare(figure)


def critic_clipping(place: Path) -> Figure:
    """Draw the gradient by layer, and the weights of two critics."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    variants = {
        "0.1": ("clip 0.1", "#fc8d59"),
        "0.01": ("clip 0.01", "#d7301f"),
        "0.001": ("clip 0.001", "#7f0000"),
        "none": ("neither", GREY),
        "wgan_gp": ("WGAN-GP", BLUE),
    }
    for row, (name, color) in variants.items():
        found = runs(place, f"critic_clipping/{row}")
        for seed, result in enumerate(found.values()):
            norms = [result.metrics[f"critic_layer/{i}"] or 0 for i in range(1, 13)]
            for axes in (left, middle):
                label = None if seed else name
                axes.semilogy(range(1, 13), norms, ".-", color=color, lw=1, ms=4, label=label)
        if name in ("clip 0.01", "WGAN-GP"):
            state = state_of(next(iter(found)), "critic")
            weights = torch.cat([w.flatten() for w in state.values() if w.dim() > 1])
            right.hist(weights.tolist(), 80, range=(-0.2, 0.2), color=color, alpha=0.7, label=name)
    left.set(xlabel="layer", title="gradient of the critic's loss, by layer")
    middle.set(xlabel="layer", title="of these, the large ones", ylim=(0.01, 100))
    right.set(xlabel="weight", yscale="log", title="the critic's weights, seed 0")
    for axes in (left, middle):
        axes.set_xticks(range(1, 13))
    for axes in (left, right):
        axes.legend(fontsize=8)
    return bare(figure)


def wasserstein_gaussians(place: Path) -> Figure:
    """Draw the estimates of a distance of 2, the slope, and how far the critic is from optimal."""
    names = "wasserstein/raw", "wasserstein/debiased", "slope/interpolates", "critic_optimality"
    figure, grid = plt.subplots(2, 3, figsize=(11, 5), sharex=True)
    for weight, (distance, steepness, optimum) in zip(("10.0", "0.1"), grid, strict=True):
        folder = next(iter(runs(place, f"wasserstein/{weight}")))
        steps, raw, debiased, slope, gauge = logged(folder, *names)
        distance.plot(steps, raw, color=GREY, lw=1, label="E D(x) − E D(y)")
        distance.plot(steps, debiased, color=BLUE, lw=1, label="over the mean slope")
        distance.axhline(2.0, color="black", lw=1, ls="--", label="the distance, 2")
        title = f"Wasserstein distance, λ = {float(weight):g}"
        distance.set(title=title, ylim=(0, 1.5 * max(raw[-100:])))
        distance.legend(fontsize=8)
        steepness.plot(steps, slope, color=BLUE, lw=1)
        steepness.axhline(1 + 1 / float(weight), color="black", lw=1, ls="--")
        steepness.set(title="slope, and 1 + 2/2λ", ylim=(0, 1.4 * max(slope[-100:])))
        optimum.plot(steps, gauge, color=BLUE, lw=1)
        optimum.axhline(0, color="black", lw=1, ls="--")
        spread = 3 * statistics.pstdev(gauge[len(gauge) // 2 :])
        optimum.set(title="critic_optimality, 0 at the optimum", ylim=(-2 * spread, 2 * spread))
    for axes in grid[-1]:
        axes.set_xlabel("step of the critic")
    return bare(figure)


def gans(place: Path) -> Figure:
    """Draw the critic's values, the data and the samples of the averaged generator."""
    figure, grid = plt.subplots(2, 2, figsize=(8, 8.2), layout="constrained")
    for row, (number, make) in enumerate({25: TwentyFiveGaussians, 8: EightGaussians}.items()):
        for column, (variant, name) in enumerate({"wgan_gp": "WGAN-GP", "plain": "GAN"}.items()):
            folder, result = next(iter(runs(place, f"gans/{number}_{variant}").items()))
            generator, critic = PointGenerator(2, (2,)), PointCritic((2,))
            generator.load_state_dict(state_of(folder, "ema_generator"))
            critic.load_state_dict(state_of(folder, "critic"))
            data = make(seed=0, val_size=0)
            data.setup("fit")
            with torch.no_grad():
                samples = generator(
                    torch.randn(2500, 2, generator=torch.Generator().manual_seed(1))
                )
                draw_points(grid[row, column], critic, data.train_set.tensors[0][:2500], samples)
            covered = f"{result.metrics['modes/covered']:g} of {number} modes"
            grid[row, column].set_title(f"{name}: {covered}", fontsize=11)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=4)
    return figure


def draw_points(axes: Axes, critic: nn.Module, data: Tensor, samples: Tensor) -> None:
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


FIGURES: tuple[Callable[[Path], Figure], ...] = (
    label_noise,
    dirac_gan,
    critic_clipping,
    wasserstein_gaussians,
    gans,
)


def main() -> None:
    """Draw what there are runs of."""
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "reproduced")
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE
    for draw in FIGURES:
        try:
            draw(place).savefig(out / f"{draw.__name__}.png", dpi=100)
            print(out / f"{draw.__name__}.png")
        except MissingError as row:
            print(f"{draw.__name__}: no run of {row}: python -m gpkit.reproduce --only {row}")


if __name__ == "__main__":
    main()
