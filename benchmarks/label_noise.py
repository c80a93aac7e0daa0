"""Label noise: what a penalty on the weight gradient is for.

40 % of 1000 training labels are drawn anew; the accuracy is on 797 clean test digits.

    python benchmarks/label_noise.py            5 seeds, two minutes; writes label_noise.png and .md
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpkit

HERE = Path(__file__).resolve().parent
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 2.0)
COLORS = ("#888888", "#9ecae1", "#6baed6", "#2171b5", "#08306b")


def run(weight: float, seed: int, folder: Path) -> tuple[float, list[int], list[float]]:
    """Train once; return the test accuracy in percent and the logged gradient norms by step."""
    penalty = ["penalty=none"] if weight == 0 else [f"penalty.weight={weight}"]
    quiet = "trainer.enable_progress_bar=false"
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = gpkit.train(
            ["experiment=label_noise", *penalty, f"seed={seed}", quiet], output_dir=folder
        )
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Scalars("grad_norm/weight")
    return metrics["test/acc"] * 100, [s.step for s in scalars], [s.value for s in scalars]


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Return a running mean."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def main() -> None:
    """Run every weight with every seed, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    rows = ["| λ | clean test accuracy, % | seeds |", "| --- | --- | --- |"]
    for place, (weight, color) in enumerate(zip(WEIGHTS, COLORS, strict=True)):
        accuracies = []
        for seed in range(seeds):
            with TemporaryDirectory() as folder:
                accuracy, steps, norms = run(weight, seed, Path(folder))
            accuracies.append(accuracy)
            label = "no penalty" if weight == 0 else f"λ = {weight:g}"
            if seed == 0:
                left.plot(steps, smooth(norms), color=color, label=label, lw=1.8)
            right.plot(place, accuracy, "o", color="black", ms=3, zorder=3)
        mean, spread = statistics.fmean(accuracies), statistics.stdev(accuracies)
        right.bar(place, mean, color=color)
        right.text(place, 52, f"{mean:.1f}", ha="center", color="white", fontweight="bold")
        rows.append(f"| {weight:g} | {mean:.1f} ± {spread:.1f} | {seeds} |")
        print(rows[-1], flush=True)

    left.set(xlabel="step", ylabel="grad_norm/weight", yscale="log", title="‖∇L‖, as logged")
    left.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    left.minorticks_off()
    left.legend(fontsize=8, ncols=2)
    right.set(ylim=(50, 100), title="accuracy on clean test labels, %")
    right.set_xticks(range(len(WEIGHTS)), [f"{w:g}" for w in WEIGHTS])
    right.set_xlabel("λ, the weight of ‖∇L‖²")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "label_noise.png", dpi=110)
    (HERE / "label_noise.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
