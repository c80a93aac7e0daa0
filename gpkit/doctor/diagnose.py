"""`diagnose`: all checks of one or several penalties on a net, and one report."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.random import device_of, random_state, set_random_state
from gpkit.doctor.checks.conventions import convention
from gpkit.doctor.checks.cost import cost
from gpkit.doctor.checks.derivatives import (
    compiled,
    no_curvature,
    not_finite_derivative,
    operations,
)
from gpkit.doctor.checks.forward import coupled, in_place, not_finite, random_forward
from gpkit.doctor.checks.gradient import wrong_gradient
from gpkit.doctor.checks.inputs import integer_input, mean_loss, refusal, selected
from gpkit.doctor.checks.precision import underflow
from gpkit.doctor.checks.strength import size
from gpkit.doctor.checks.training import frozen, reached, tied, untracked
from gpkit.doctor.example import as_example
from gpkit.doctor.prepare import fused, uncompiled
from gpkit.doctor.report import Report, joined
from gpkit.doctor.trial import FAILURES, Trial
from gpkit.finding import Finding
from gpkit.sums import Penalties, as_sum

Check = Callable[[Trial], Iterator[Finding]]

# In the order in which they are made: what `refusal` finds comes after what says where it is.
CHECKS: tuple[Check, ...] = (
    integer_input,
    mean_loss,
    compiled,
    operations,
    no_curvature,
    in_place,
    not_finite,
    not_finite_derivative,
    selected,
    refusal,
    random_forward,
    coupled,
    wrong_gradient,
    frozen,
    tied,
    untracked,
    reached,
    size,
    underflow,
    convention,
    cost,
)


def diagnose(
    net: nn.Module,
    penalty: Penalties,
    example: Any = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    real: Tensor | None = None,
    fake: Tensor | None = None,
    target: Any = None,
    metric: Any = None,
    sample_weight: Tensor | None = None,
    share: float = 0.1,
    costs: bool = True,
) -> Report:
    """Say what stops penalties on a net, makes them wrong, or makes them train less than it seems.

    It tries a copy of the net in the mode in which it is, on the samples. Neither the net nor the
    penalties nor torch's random numbers change.

    Args:
        net: the net, in training mode if it is to be trained.
        penalty: a penalty, a list of penalties, a dict of them by name, or a `gpkit.sum`.
        example: a batch: x ``[B, *S]``, (x, y), (x, y, env), or a mapping of the net's arguments
            and labels. x may be a tuple or a dict for a net with several inputs. Penalties "in the
            input" are in the first that is a floating-point tensor.
        loss: (output, y) -> loss, as it is trained on. None is the cross-entropy for classes, else
            the mean square.
        real: real samples of a critic, in the place of ``example``.
        fake: fake samples; None takes x_{i-1} for x_i.
        target: of the penalty's call, see `gpkit.GradientPenalty`.
        metric: the same.
        sample_weight: the same.
        share: the part of the loss's gradient that the suggested weight gives the penalty's.
        costs: whether to measure time and memory.

    Returns:
        The report: ``print`` it; ``.ok``, ``.findings``, ``.numbers`` and ``.to_dict()``.

    Raises:
        TypeError: if the net is no module, or there are no samples.
        ValueError: if ``share`` is not positive, or there is no penalty.

    >>> import gpkit, torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> report = diagnose(net, gpkit.curvature(), torch.randn(8, 3), costs=False)
    >>> report.ok, sorted({f.code for f in report.errors}), report.errors[0].module
    (False, ['piecewise-linear'], '1')
    >>> diagnose(net, gpkit.r1(), torch.randn(8, 3), costs=False).ok
    True
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"`net=...` must be a torch.nn.Module; got a {type(net).__name__}")
    checks.number("diagnose(share=...)", share, 0, strict=True)
    penalties = as_sum(penalty)
    if not penalties:
        raise ValueError("diagnose(net, penalty, example) needs a penalty; got none")
    given = {"target": target, "metric": metric, "sample_weight": sample_weight}
    batch = as_example(example, loss, real, fake, given)
    device = device_of(net, batch.x)
    before, reports = random_state(device), []
    try:
        for name, part in penalties.items():
            own = uncompiled(net, {})
            trial = Trial(own, name, copy.deepcopy(part), batch, fused(net), share, costs)
            with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
                warnings.simplefilter("ignore")  # what the penalty warns of is a finding
                found = [replace(f, penalty=name) for f in findings_of(trial)]
            reports.append(Report(tuple(found), {name: trial.numbers}))
    finally:
        set_random_state(before, device)
    return joined(reports)


def findings_of(trial: Trial) -> list[Finding]:
    """Return the findings of all checks of one penalty, each once."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check(trial)
        except FAILURES as failure:
            said = str(failure).strip().splitlines()[0]
            if trial.outcome.error is None:
                why = f"the check {check.__name__!r} could not be made ({said})"
                found.append(Finding("call", "warning", why))
    named = {f.code for f in found if f.module and f.severity == "error"}
    kept = [f for f in found if f.module or f.severity != "error" or f.code not in named]
    return list(dict.fromkeys(kept))
