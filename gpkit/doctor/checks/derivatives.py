"""Checks of the derivatives: which operations have none, or a wrong one, and in which module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpkit.autodiff import graph
from gpkit.doctor.trial import FAILURES, Trial
from gpkit.finding import Finding, error
from gpkit.findings.derivatives import derivative_findings
from gpkit.findings.located import named, not_finite, piecewise_linear
from gpkit.findings.watch import ROOT
from gpkit.hints import HINTS


def compiled(trial: Trial) -> Iterator[Finding]:
    """Find compiled modules that a penalty would differentiate twice."""
    if trial.twice < 2:
        return
    found = error(*HINTS["torch.compile with aot_autograd"])
    for name in trial.compiled:
        yield Finding(found.code, "error", found.why, found.fix, name or ROOT)


def operations(trial: Trial) -> Iterator[Finding]:
    """Find each operation without a correct second derivative, with the module that made it."""
    if trial.twice < 2:
        return
    try:
        targets, watch = trial.graphs
    except FAILURES:
        return  # `refusal` says why
    for target in targets if targets[0].batched else targets[:1]:
        known = dict(derivative_findings(target.y, target.xs, trial.twice))
        for module, found in named(graph.between(target.y, target.xs), known, watch):
            yield replace(found, module=module)


def not_finite_derivative(trial: Trial) -> Iterator[Finding]:
    """Find the operation whose derivative is NaN or infinite, if the penalty's gradient is."""
    terms, failed = trial.outcome.terms, trial.outcome.error
    if terms is None:
        broken = getattr(getattr(failed, "finding", None), "code", "") == "not-finite"
    else:
        numbers = [terms.penalty, *trial.outcome.gradients.values()]
        broken = not all(n.isfinite().all() for n in numbers if n is not None)
    if not broken or trial.twice < 2:
        return
    targets, watch = trial.graphs
    nodes = {n for t in targets for n in graph.between(t.y, t.xs)}
    for module, found in not_finite(nodes, watch, trial.twice):
        yield replace(found, module=module)


def no_curvature(trial: Trial) -> Iterator[Finding]:
    """Find a piecewise-linear operation whose second derivative is taken, with its module."""
    order = trial.needs.order if trial.needs is not None else 1
    if trial.twice < 2 or order < 2 or trial.outcome.terms is not None:
        return
    if getattr(getattr(trial.outcome.error, "finding", None), "code", "") != "piecewise-linear":
        return
    targets, watch = trial.graphs
    nodes = [n for t in targets for n in graph.between(t.y, t.xs)]
    for module in piecewise_linear(nodes, watch):
        why = f"order {order} of a piecewise-linear operation is zero everywhere"
        yield Finding("piecewise-linear", "error", why, "use GELU, SiLU, softplus or tanh", module)
