"""How often estimators run the net, counted by a hook: as often as their docstrings say."""

import pytest
import torch
from torch import nn

import gpkit

D = 3
RUNS = {  # estimator, order, runs of a use; the first use has one more, see `require_same`
    "exact": ("exact", 1, 1),
    "projection": ("projection", 1, 1),
    "jvp": (gpkit.jvp(), 1, 1),
    "jvp of three": (gpkit.jvp(3), 1, 3),
    "random": (gpkit.random_difference(), 1, 2),
    "random of three": (gpkit.random_difference(n=3), 1, 4),
    "stencil": (gpkit.stencil(), 1, 2 * D),
    "stencil of four": (gpkit.stencil(taps=4), 1, 4 * D),
    "trace": (gpkit.trace(), 2, 1),
    "trace by jets": (gpkit.trace(jets=True), 2, D),
    "two traces": (gpkit.trace(2), 2, 1),
    "taylor": (gpkit.taylor(), 1, 1),
    "taylor of two": (gpkit.taylor(2), 2, 2),
    "difference": (gpkit.finite_difference(1e-3), 1, 2),
    "central": (gpkit.finite_difference(1e-3, "central"), 1, 3),
}


def counted(**axes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    runs = []
    net.register_forward_hook(lambda *_: runs.append(1))
    penalty = gpkit.GradientPenalty(seed=0, **axes)
    x, found = torch.randn(5, D, dtype=torch.float64), []
    for _ in range(3):
        runs.clear()
        penalty(net, x).backward()
        found.append(len(runs))
    return found


@pytest.mark.parametrize(("estimator", "order", "runs"), RUNS.values(), ids=RUNS)
def test_the_net_runs_as_often_as_needed(estimator, order, runs):
    first, *others = counted(estimator=estimator, order=order)
    assert others == [runs, runs]
    assert first <= runs + 1


def test_a_metric_takes_no_run_of_its_own():
    metric = lambda x: 1 + x.abs()  # noqa: E731
    assert counted(estimator=gpkit.jvp(), metric=metric)[1:] == [1, 1]
    assert counted(estimator=gpkit.stencil(), metric=metric)[1:] == [2 * D] * 2
