"""Estimators against the exact penalty: value and parameter gradient, in float64.

python benchmarks/estimators.py        half a minute; writes estimators.png and .md
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpkit

HERE = Path(__file__).resolve().parent
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
STEPS = [10.0**-k for k in torch.arange(1, 8, 0.5).tolist()]
REPEATS = 40


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a smooth net and data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    return net, torch.randn(16, 8).double(), torch.randint(10, (16,))


def gradient(penalty: Tensor, net: nn.Module) -> Tensor:
    """Return the parameter gradient of a penalty as one vector."""
    grads = torch.autograd.grad(penalty, list(net.parameters()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, net.parameters())]  # noqa: B905
    return torch.cat([part.flatten() for part in parts])


def error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error in the 2-norm."""
    return float((found - exact).norm() / exact.norm())


def projections(axes: plt.Axes) -> list[str]:
    """Draw the error of the Jacobian's and the Hessian's estimate over the number of draws."""
    net, x, _ = problem()
    rows = []
    cases = {
        "Jacobian": lambda estimator: gpkit.jacobian(estimator=estimator),
        "order 2": lambda estimator: gpkit.curvature(estimator=estimator),
    }
    for name, build in cases.items():
        exact = gradient(build("exact")(net, x), net)
        for kind, style in (("rademacher", "o-"), ("gaussian", "s--")):
            errors = []
            for n in COUNTS:
                penalty = build(gpkit.projection(n, kind))
                draws = [error(gradient(penalty(net, x), net), exact) for _ in range(REPEATS)]
                errors.append(sum(e * e for e in draws) ** 0.5 / REPEATS**0.5)
            slope = torch.tensor(errors[-1] / errors[0]).log() / torch.tensor(256.0).log()
            axes.loglog(COUNTS, errors, style, ms=3, label=f"{name}, {kind}")
            rows.append(f"| projection, {name}, {kind} | {errors[0]:.2g} (n = 1) | n^{slope:.2f} |")
    axes.loglog(COUNTS, [0.8 / n**0.5 for n in COUNTS], ":", color="gray", label="1/√n")
    axes.set(xlabel="projections n", title="random projections")
    return rows


def finite_differences(axes: plt.Axes) -> list[str]:
    """Draw the error of finite differences over the step, for inputs and for weights."""
    net, x, y = problem()

    def losses(x: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    cases = {
        "inputs": lambda e: gpkit.input_grad_norm(estimator=e)(losses, x),
        "weights": lambda e: gpkit.weight_grad_norm(estimator=e)(lambda: losses(x).mean(), net),
    }
    rows = []
    for name, style in (("inputs", "o"), ("weights", "s")):
        exact = gradient(cases[name]("exact"), net)
        for side, line in (("forward", "-"), ("central", "--")):
            errors = [
                error(gradient(cases[name](gpkit.finite_difference(h, side)), net), exact)
                for h in STEPS
            ]
            slope = (torch.tensor(errors[2] / errors[0]).log() / torch.tensor(0.1).log()).item()
            best = error(gradient(cases[name](gpkit.finite_difference(side=side)), net), exact)
            axes.loglog(STEPS, errors, style + line, ms=3, label=f"{name}, {side}")
            rows.append(
                f"| finite difference, {name}, {side} | {best:.1g} (default step) | h^{slope:.2f} |"
            )
    axes.set(xlabel="step h", title="finite differences")
    return rows


def main() -> None:
    """Draw both, and write the table of orders."""
    torch.set_num_threads(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    rows = ["| estimator | relative error of the parameter gradient | falls as |"]
    rows += ["| --- | --- | --- |", *projections(left), *finite_differences(right)]
    for axes in (left, right):
        axes.set_ylabel("relative error of ∂penalty/∂θ")
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "estimators.png", dpi=110)
    (HERE / "estimators.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
