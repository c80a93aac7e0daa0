"""Finite differences in the weights against double backprop, with kinks and without.

Digits with 40 % label noise, as in label_noise.py; the accuracy is on 797 clean test digits.
"crossing" is the plain difference at the same step, in which units also change sides.

    python benchmarks/kinks.py                 3 seeds, ten minutes; writes the table of kinks.md
    python benchmarks/kinks.py --seeds 13 --cell LeakyReLU 0.1 SGD    one row, which it prints
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpkit
from gpkit.data import Digits

HERE = Path(__file__).resolve().parent
ACTIVATIONS = {"ReLU": nn.ReLU, "LeakyReLU": nn.LeakyReLU, "GELU": nn.GELU}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}
ESTIMATORS = {
    "exact": "exact",
    "finite difference": "finite_difference",
    "crossing": gpkit.finite_difference(7e-4, cross_kinks=True),
}
EPOCHS, BATCH = 60, 64
MARK = "<!-- table -->"


def run(activation: str, weight: float, optimizer: str, estimator: str, seed: int) -> float:
    """Train once; return the test accuracy in percent."""
    digits = Digits(train_size=1000, val_size=0, test_size=797, label_noise=0.4, flatten=True)
    digits.setup("fit")
    digits.setup("test")
    (x, y), (clean, labels) = (s[:] for s in (digits.train_set, digits.test_set))
    torch.manual_seed(seed)
    act = ACTIVATIONS[activation]
    net = nn.Sequential(nn.Linear(64, 128), act(), nn.Linear(128, 128), act(), nn.Linear(128, 10))
    steps = OPTIMIZERS[optimizer](net.parameters())
    penalty = gpkit.weight_grad_norm(weight, estimator=ESTIMATORS[estimator])
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):

            def loss(rows: Tensor = rows) -> Tensor:
                return F.cross_entropy(net(x[rows]), y[rows])

            steps.zero_grad()
            penalty.with_loss(loss, net).backward()
            steps.step()
    with torch.no_grad():
        return 100 * (net(clean).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Run every cell with every seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cell", nargs=3, metavar=("NET", "WEIGHT", "OPTIMIZER"))
    given = parser.parse_args()
    seeds = given.seeds
    cells = list(itertools.product(ACTIVATIONS, (0.1, 0.3, 1.0), OPTIMIZERS))
    if given.cell:
        cells = [cell for cell in cells if [*map(str, cell)] == given.cell]
    torch.set_num_threads(1)
    rows = [
        f"{date.today()}, `python benchmarks/kinks.py`, torch {torch.__version__}.",
        f"Test accuracy in percent: the mean of {seeds} seeds, and each of them.",
        "",
        "| net | λ | optimiser | exact | finite difference | crossing |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        found = []
        for estimator in ESTIMATORS:
            each = [run(*cell, estimator, seed) for seed in range(seeds)]
            found.append(f"{statistics.fmean(each):.1f} ({', '.join(f'{a:.1f}' for a in each)})")
        rows.append(f"| {' | '.join(map(str, [*cell, *found]))} |")
        print(rows[-1], flush=True)
    if given.cell:
        return
    page = HERE / "kinks.md"
    said = page.read_text().partition(MARK)[0]
    page.write_text("\n".join([said + MARK, *rows]) + "\n")


if __name__ == "__main__":
    main()
