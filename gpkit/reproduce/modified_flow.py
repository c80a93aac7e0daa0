r"""Gradient descent follows the flow of a modified loss: the order of its error, measured.

A step h of gradient descent on L follows, to second order, the gradient flow of
:math:`L + \tfrac{h}{4} \|\nabla L\|^2` (Barrett and Dherin 2021, arXiv:2009.11162). So after a
fixed time the distance from that flow falls as h², where from the flow of L it falls as h.

    python -m gpkit.reproduce.modified_flow seed=0,1,2 hydra.sweep.dir=FOLDER
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import gpkit
from gpkit.app.result import Result, recorded

STEPS = (0.1, 0.05)  # h, twice and once
TIME = 1.0
SUBSTEPS = 4  # of the flow, for each step of gradient descent

Field = Callable[[Tensor], Tensor]


def problem(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a net and its loss, on 32 random samples of a random function."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 4, generator=rng, dtype=torch.float64)
    y = (x @ torch.randn(4, 1, generator=rng, dtype=torch.float64)).sin()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return net, lambda: nn.functional.mse_loss(net(x), y)


def descent(net: nn.Module, loss: Callable[[], Tensor], weight: float) -> Field:
    """Return -∇(L + weight · ‖∇L‖²) as a function of the parameters in one vector."""
    penalty = gpkit.weight_grad_norm(weight=weight)
    params = list(net.parameters())

    def field(theta: Tensor) -> Tensor:
        vector_to_parameters(theta, params)
        total = loss()
        if weight:
            total = total + penalty(total, params)
        return -parameters_to_vector(torch.autograd.grad(total, params))

    return field


def flow(field: Field, theta: Tensor, time: float, steps: int) -> Tensor:
    """Return where the flow of a field is after a time, by classical Runge-Kutta steps.

    >>> end = flow(lambda z: -z, torch.ones(1, dtype=torch.float64), 1.0, 100)
    >>> abs(end.item() - math.exp(-1)) < 1e-9
    True
    """
    h = time / steps
    for _ in range(steps):
        a = field(theta)
        b = field(theta + h / 2 * a)
        c = field(theta + h / 2 * b)
        d = field(theta + h * c)
        theta = theta + h / 6 * (a + 2 * b + 2 * c + d)
    return theta


def orders(seed: int) -> dict[str, float]:
    """Return the orders of the two errors, log₂ of the error at h over that at h/2."""
    net, loss = problem(seed)
    start = parameters_to_vector(net.parameters()).detach().clone()
    errors: dict[str, list[float]] = {"plain": [], "modified": []}
    for h in STEPS:
        count = round(TIME / h)
        theta, field = start, descent(net, loss, 0.0)
        for _ in range(count):
            theta = theta + h * field(theta)
        for name, weight in (("plain", 0.0), ("modified", h / 4)):
            end = flow(descent(net, loss, weight), start, TIME, SUBSTEPS * count)
            errors[name].append((theta - end).norm().item())
    return {f"order/{name}": math.log2(coarse / fine) for name, (coarse, fine) in errors.items()}


def main(words: Sequence[str]) -> None:
    """Measure for each seed, and leave results as a sweep does.

    Args:
        words: ``seed=0,1,2 hydra.sweep.dir=FOLDER``.
    """
    given = dict(word.partition("=")[::2] for word in words)
    place = Path(given.get("hydra.sweep.dir", "modified_flow"))
    for seed in map(int, given.get("seed", "0").split(",")):
        result = Result({"seed": seed}, [f"seed={seed}"], {"seed": seed})
        with recorded(result, place / f"{seed}-seed={seed}", str):
            result.metrics = dict(orders(seed))
        print(seed, result.metrics)


if __name__ == "__main__":
    main(sys.argv[1:])
