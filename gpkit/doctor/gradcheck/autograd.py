"""The gradient that trains the net, against differences of the value."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gpkit.doctor.gradcheck.compared import Known
from gpkit.doctor.gradcheck.report import Check, failed, unchecked
from gpkit.doctor.gradcheck.trial import Trial

DIRECTIONS = 3
NAMED = 40  # parameters that are looked at one by one, to say which are wrong


def gradient(known: Known) -> Check:
    """The gradient in the parameters is that of the value, by central differences.

    It catches a forgotten create_graph, and anything else that autograd takes for a constant.

    Returns:
        The check.
    """
    trial, run = known.trial, known.run
    found = [_along(known, trial.params, seed) for seed in range(DIRECTIONS)]
    usable = [pair for pair in found if pair is not None]
    if not usable:
        return unchecked("the value jumps between parameters that are close to each other")
    if not any(expected or own for expected, own in usable):
        return failed(
            "the value depends on no parameter of the net that requires grad",
            "does it use another net than its argument, or is the derivative of this net constant, "
            "as the second one of a ReLU net is?",
        )
    wrong = [pair for pair in usable if not _agree(known, *pair)]
    if not wrong:
        worst = max(abs(a - b) / max(abs(a), 1e-30) for a, b in usable)
        return Check(f"equals differences of the value, to {worst:.0e}")
    expected, own = wrong[0]
    what = f"{own:.6g} along a direction, where differences of the value give {expected:.6g}"
    if not run.graph:
        return failed(
            f"the value has no graph; {what}",
            "create_graph=True is missing in torch.autograd.grad, or the value was detached, made "
            "a number, or computed under no_grad: it trains nothing",
        )
    off = [name for name in list(trial.params)[:NAMED] if not _right(known, name)]
    named = f"; wrong in {', '.join(off[:5])}{' and others' if len(off) > 5 else ''}" if off else ""
    return failed(
        what + named,
        "a part of the value is a constant to autograd: a missing create_graph=True, .detach(), "
        ".data, .item() or no_grad on the way. If an estimate is meant whose gradient is not that "
        "of its value, pass like=",
    )


def _right(known: Known, name: str) -> bool:
    pair = _along(known, [name], 0)
    return pair is None or _agree(known, *pair)


def _agree(known: Known, expected: float, own: float) -> bool:
    """Whether they are equal but for the rounding of the difference."""
    slack = 1e-4 if known.run.dtype == torch.float64 else 3e-2
    return abs(expected - own) <= slack * max(abs(expected), abs(own)) + _noise(known)


def _step(known: Known) -> float:
    return 1e-5 if known.run.dtype == torch.float64 else 1e-2


def _noise(known: Known) -> float:
    """The rounding of a difference."""
    rounding = torch.finfo(known.run.dtype).eps * max(abs(known.run.value), 1e-30)
    return 100 * rounding / _step(known)


def _along(known: Known, names: Iterable[str], seed: int) -> tuple[float, float] | None:
    """Return the derivative along a random direction by differences, and by autograd.

    Returns:
        Both; or None if the differences of two step lengths disagree, as across a kink.
    """
    trial, h = known.trial, _step(known)
    rng = torch.Generator().manual_seed(seed)
    direction = {name: _direction(trial.params[name], rng) for name in names}
    one, two = (_difference(trial, direction, step) for step in (h, 2 * h))
    if abs(one - two) > 1e-2 * max(abs(one), abs(two)) + 2 * _noise(known):
        return None
    own = sum(float((known.run.gradient[n] * v).sum()) for n, v in direction.items())
    if max(abs(one), abs(own)) <= _noise(known):
        return 0.0, 0.0
    return one, own


def _direction(p: Tensor, rng: torch.Generator) -> Tensor:
    size = float(p.detach().square().mean().sqrt()) if p.numel() else 0.0
    drawn = torch.randn(p.shape, generator=rng, dtype=torch.float64)
    return (drawn * (size + 0.01)).to(p)


def _difference(trial: Trial, direction: dict[str, Tensor], h: float) -> float:
    values = []
    kept = {name: trial.params[name].detach().clone() for name in direction}
    for sign in (1, -1):
        try:
            with torch.no_grad():
                for name, v in direction.items():
                    trial.params[name].add_(v, alpha=sign * h)
            values.append(trial.value())
        finally:
            with torch.no_grad():
                for name, p in kept.items():
                    trial.params[name].copy_(p)
    return (values[0] - values[1]) / (2 * h)
