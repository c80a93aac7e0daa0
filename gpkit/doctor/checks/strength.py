"""Checks of the size: is the penalty zero, not finite, far from the loss? Which weight to try?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from gpkit.autodiff.isolation import isolated
from gpkit.doctor.trial import FAILURES, SEED, Trial, norm_of
from gpkit.finding import Finding

STRONG = 100  # times the loss, or its gradient
STEP = 0.01  # of the curve over weights, as a part of the parameters' norm


def size(trial: Trial) -> Iterator[Finding]:
    """Compare the penalty and its gradient with the loss's, and suggest a weight."""
    terms = trial.outcome.terms
    if terms is None:
        return
    value = float(terms.penalty.detach())
    length = norm_of(trial.outcome.gradients.values())
    trial.numbers["penalty"], trial.numbers["norm of its gradient"] = value, length
    if not (math.isfinite(value) and math.isfinite(length)):
        what = "the penalty" if not math.isfinite(value) else "its gradient"
        why = f"{what} is not finite at the start: {value:.3g}, with a gradient of {length:.3g}"
        yield Finding("not-finite", "error", why, "is there a root or a norm of what is zero?")
        return
    if not length:
        why = f"the penalty is {value:.3g} at the start, and so is its gradient"
        yield Finding("zero", "warning", why, "is the last layer zero, or every unit dead?")
        return
    try:
        loss, gradients = trial.loss
    except FAILURES as failure:
        said = str(failure).strip().splitlines()[0]
        why = f"the penalty is {value:.3g}; no loss fits the example ({said})"
        yield Finding("strength", "note", why, "diagnose(..., (x, y), loss=...) compares them")
        return
    of_loss = norm_of(gradients.values())
    trial.numbers["loss"], trial.numbers["norm of the loss's gradient"] = loss, of_loss
    if not of_loss or not math.isfinite(of_loss):
        return
    weight = trial.weight * trial.share * of_loss / length
    trial.numbers["weight"], trial.numbers["suggested weight"] = trial.weight, weight
    trial.numbers["curve"] = curve(trial)
    ratio, values = length / of_loss, value / abs(loss) if loss else math.inf
    strong = ratio > STRONG or values > STRONG
    why = (
        f"at the start the penalty is {value:.3g} with a gradient of {length:.3g}, and the loss "
        f"{loss:.3g} with one of {of_loss:.3g}: {ratio:.2g} times"
    )
    fix = f"weight={weight:.2g} makes its gradient {trial.share:.0%} of the loss's"
    yield Finding("strength", "warning" if strong else "note", why, fix)


def curve(trial: Trial) -> list[dict[str, float]]:
    """Return, for weights in steps of ten, what they do to a step of gradient descent.

    All steps have the same length, 1 % of the parameters' norm.

    Returns:
        For each weight: the part of the gradient that is the penalty's, ‖λ∇P‖ / ‖∇L + λ∇P‖, and
        the part of the loss's decrease without a penalty that is kept.
    """
    of_penalty, of_loss = trial.outcome.gradients, trial.loss[1]
    start, length = trial.loss[0], STEP * norm_of(trial.parameters.values())
    plain = start - _loss_after(trial, of_loss, length)
    rows = []
    for power in range(-3, 4):
        factor = 10.0**power
        total = {}
        for name in trial.parameters:
            parts = [g for g in (of_loss[name], _times(factor, of_penalty[name])) if g is not None]
            total[name] = sum(parts[1:], parts[0]) if parts else None
        share = factor * norm_of(of_penalty.values()) / (norm_of(total.values()) or math.inf)
        kept = (start - _loss_after(trial, total, length)) / plain if plain else math.nan
        rows.append({"weight": trial.weight * factor, "share": share, "kept": kept})
    return rows


def _times(factor: float, gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else factor * gradient.detach()


def _loss_after(trial: Trial, gradients: dict[str, Any], length: float) -> float:
    """Return the loss after a step of a given length against a gradient."""
    factor = length / (norm_of(gradients.values()) or math.inf)
    before = {name: p.data for name, p in trial.parameters.items()}
    try:
        for name, p in trial.parameters.items():
            if gradients[name] is not None:
                p.data = p.data - factor * gradients[name]
        with isolated(trial.net, SEED, trial.device, twice=False), torch.no_grad():
            return float(trial.example.training_loss(trial.net))
    finally:
        for name, p in trial.parameters.items():
            p.data = before[name]
