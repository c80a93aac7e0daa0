"""A Wasserstein distance with a known answer: N((2, 0), I) is 2 away from N(0, I).

At the optimum of a critic with the penalty λ (n - 1)² the slope is n = 1 + 2/(2λ) everywhere, and
E D(x) - E D(y) = 2n: divided by the slope it is the distance.

    python benchmarks/wasserstein_gaussians.py     3 seeds, two minutes; writes the .png and .md
"""

from __future__ import annotations

import argparse
import statistics
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from runs import logged, run

HERE = Path(__file__).resolve().parent
DISTANCE = 2.0
PUBLISHED = {10.0: "2.206, 1.100, 2.006", 0.1: "22.2, 10.9, –"}
NAMES = "wasserstein/raw", "wasserstein/debiased", "slope/interpolates", "critic_optimality"


def described(numbers: list[float], digits: int) -> str:
    """Return mean ± standard deviation."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else float("nan")
    return f"{statistics.fmean(numbers):.{digits}f} ± {spread:.{digits}f}"


def main() -> None:
    """Run both weights with every seed, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)

    figure, grid = plt.subplots(2, 3, figsize=(11, 5), sharex=True)
    rows = [
        "| λ | raw, slope, raw over slope: published | by the formula | raw, on samples of its own "
        "| slope | raw over slope |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for weight, axes in zip(PUBLISHED, grid, strict=True):
        raws, distances = [], []
        for seed in range(seeds):
            with TemporaryDirectory() as folder:
                command = ["experiment=wasserstein_gaussians", f"penalty.weight={weight}"]
                found = run([*command, f"seed={seed}"], Path(folder))
                if seed == 0:
                    draw(axes, weight, *logged(Path(folder), *NAMES))
            raws.append(found["test/wasserstein/raw"])
            distances.append(found["test/wasserstein/debiased"])
        slopes = [raw / distance for raw, distance in zip(raws, distances, strict=True)]
        slope = 1 + DISTANCE / (2 * weight)
        formula = f"{DISTANCE * slope:.3g}, {slope:.3g}, {DISTANCE:g}"
        digits = 3 if weight > 1 else 2
        measured = described(raws, digits), described(slopes, digits), described(distances, 3)
        rows.append(f"| {weight:g} | {PUBLISHED[weight]} | {formula} | {' | '.join(measured)} |")
        print(rows[-1], flush=True)

    for one in grid[-1]:
        one.set_xlabel("step of the critic")
    for one in grid.flat:
        one.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "wasserstein_gaussians.png", dpi=100)
    dated = f"{date.today():%Y-%m-%d}, `python benchmarks/wasserstein_gaussians.py`, {seeds} seeds."
    (HERE / "wasserstein_gaussians.md").write_text("\n".join([dated, "", *rows]) + "\n")


def draw(
    axes: list[plt.Axes],
    weight: float,
    steps: list[float],
    raw: list[float],
    debiased: list[float],
    slope: list[float],
    gauge: list[float],
) -> None:
    """Draw a row of panels, from what a run has logged on the batches of its training."""
    distance, steepness, optimum = axes
    distance.plot(steps, raw, color="#888888", lw=1, label="E D(x) − E D(y)")
    distance.plot(steps, debiased, color="#2171b5", lw=1, label="over the mean slope")
    distance.axhline(DISTANCE, color="black", lw=1, ls="--", label="the distance, 2")
    distance.set(title=f"Wasserstein distance, λ = {weight:g}", ylim=(0, 1.5 * max(raw[-100:])))
    distance.legend(fontsize=8)
    steepness.plot(steps, slope, color="#2171b5", lw=1)
    steepness.axhline(1 + DISTANCE / (2 * weight), color="black", lw=1, ls="--")
    steepness.set(title="slope, and 1 + 2/2λ", ylim=(0, 1.4 * max(slope[-100:])))
    optimum.plot(steps, gauge, color="#2171b5", lw=1)
    optimum.axhline(0, color="black", lw=1, ls="--")
    spread = 3 * statistics.pstdev(gauge[len(gauge) // 2 :])
    optimum.set(title="critic_optimality, 0 at the optimum", ylim=(-2 * spread, 2 * spread))


if __name__ == "__main__":
    main()
