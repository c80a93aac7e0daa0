"""Check of the cost: the time and memory of a training step, in plain steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpkit.autodiff.isolation import isolated
from gpkit.bench.counted import memory_of
from gpkit.bench.measure import quartiles, times
from gpkit.doctor.trial import SEED, Trial
from gpkit.finding import Finding

ROUNDS = 5


def cost(trial: Trial) -> Iterator[Finding]:
    """Measure a step with the penalty beside one without it."""
    if not trial.costs or trial.outcome.terms is None or not trial.parameters:
        return
    params = list(trial.parameters.values())
    if not trial.loss[1] or not any(g is not None for g in trial.loss[1].values()):
        return

    def plain() -> None:
        with isolated(trial.net, SEED, trial.device, twice=False):
            loss = trial.example.training_loss(trial.net)
        torch.autograd.grad(loss, params, allow_unused=True)

    def penalised() -> None:
        with isolated(trial.net, SEED, trial.device, twice=False):
            loss = trial.example.training_loss(trial.net)
        total = loss + trial.evaluate().penalty
        torch.autograd.grad(total, params, allow_unused=True)

    penalised()
    plain()
    timed = times({"plain": plain, "penalised": penalised}, ROUNDS)
    ratios = [a / b for a, b in zip(timed["penalised"], timed["plain"], strict=True)]
    low, middle, high = quartiles(ratios)
    memory = memory_of(penalised) / memory_of(plain)
    trial.numbers["plain step in seconds"] = min(timed["plain"])
    trial.numbers["time in plain steps"] = middle
    trial.numbers["memory in plain steps"] = memory
    why = (
        f"a step with the penalty takes {middle:.1f} plain steps ({low:.1f} to {high:.1f}) and "
        f"{memory:.1f} times the memory, on this batch and machine"
    )
    fix = "python -m gpkit.bench compares the estimators; every=k acts on each k-th step"
    yield Finding("cost", "note", why, fix)
