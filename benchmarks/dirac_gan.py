"""The Dirac-GAN: which penalties lead to the equilibrium. Mescheder et al. (2018), figure 1.

python benchmarks/dirac_gan.py             15 seconds; writes dirac_gan.png and .md
"""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from runs import logged, run

HERE = Path(__file__).resolve().parent
WGAN_GP = ["penalty=wgan_gp", "penalty.weight=0.35", "module.loss=wasserstein"]
VARIANTS = {  # what is on the command line, the published distance after 500 steps, a colour
    "no penalty": (["penalty=none"], "3.10", "#888888"),
    "WGAN-GP, 0.7": (WGAN_GP, "1.80", "#d95f02"),
    "R1, γ 0.3": ([], "2.6e-6", "#6baed6"),
    "R1, γ 1": (["penalty.weight=1.0"], "9.5e-22", "#08306b"),
}
PREDICTED = {"R1, γ 0.3": math.sqrt(0.95), "R1, γ 1": 0.9}  # |eigenvalues| of a step at (0, 0)
NAMES = "dirac/theta", "dirac/psi"


def contraction(theta: list[float], psi: list[float]) -> float:
    """Return the mean contraction of a step, from steps 200 to 400.

    A linear step shrinks the area between two places by its determinant, here the square of the
    eigenvalues' absolute value; the distance itself goes up and down on the way.
    """
    early, late = (theta[t] * psi[t + 1] - theta[t + 1] * psi[t] for t in (199, 399))
    return (late / early) ** (1 / 400)


def main() -> None:
    """Run every variant, print the table, draw the figure."""
    torch.set_num_threads(1)
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.2), width_ratios=(1, 1, 1, 1, 1.5))
    *planes, distances = axes
    rows = [
        "| penalty | distance after 500 steps: published | measured "
        "| contraction a step: predicted | measured, steps 200 to 400 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (name, (overrides, published, color)), plane in zip(VARIANTS.items(), planes, strict=True):
        with TemporaryDirectory() as folder:
            final = run(["experiment=dirac_gan", *overrides], Path(folder))["dirac/distance"]
            steps, theta, psi = logged(Path(folder), *NAMES)
        distance = list(map(math.hypot, theta, psi))
        plane.plot([1, *theta], [1, *psi], "-", color=color, lw=0.8)
        plane.plot([1, *theta], [1, *psi], ".", color=color, ms=3)
        plane.plot(1, 1, "o", color="black", ms=5)
        plane.plot(0, 0, "+", color="black", ms=9)
        plane.set(title=name, xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), xlabel="θ", aspect="equal")
        distances.semilogy(steps, distance, color=color, label=name)
        rates = "|"
        if name in PREDICTED:
            rates = f"{PREDICTED[name]:.4f} | {contraction(theta, psi):.4f}"
        rows.append(f"| {name} | {published} | {final:#.3g} | {rates} |")
        print(rows[-1], flush=True)
    planes[0].set_ylabel("ψ")
    distances.set(xlabel="step", title="distance from the equilibrium")
    distances.legend(fontsize=8)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "dirac_gan.png", dpi=100)
    dated = f"{date.today():%Y-%m-%d}, `python benchmarks/dirac_gan.py`, float64."
    (HERE / "dirac_gan.md").write_text("\n".join([dated, "", *rows]) + "\n")


if __name__ == "__main__":
    main()
