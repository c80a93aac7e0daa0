"""Checks of the derivatives: which operations have none, or a wrong one, and in which module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from gpkit.autodiff import graph
from gpkit.doctor.example import Example
from gpkit.doctor.trial import FAILURES, SEED, Trial, norm_of
from gpkit.environment_penalty import EnvironmentPenalty
from gpkit.estimators.exact import exact
from gpkit.estimators.projection import projection
from gpkit.finding import Finding, error
from gpkit.findings.derivatives import derivative_findings
from gpkit.findings.located import named, piecewise_linear
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


# Of these the gradient is that of the value, not of an estimate.
CONSISTENT = (exact, projection)
STEPS = (1e-5, 1e-6)  # in float64, as parts of the parameters' norm
TOLERANCE = 1e-4


def wrong_gradient(trial: Trial) -> Iterator[Finding]:
    r"""Compare the penalty's gradient with differences of its value, on a copy in float64.

    .. math:: \langle \nabla P, d \rangle \approx (P(\theta + h d) - P(\theta - h d)) / 2h

    It is wrong if two step sizes agree with each other and not with the gradient. What a forward
    pass moves with the weights, and no training step differentiates, such as the vectors of
    spectral norm, stands still meanwhile.

    Yields:
        A finding if it is wrong.
    """
    consistent = isinstance(trial.penalty, EnvironmentPenalty) or isinstance(
        getattr(trial.penalty, "estimator", None), CONSISTENT
    )
    terms = trial.outcome.terms
    if not consistent or terms is None or not norm_of(trial.outcome.gradients.values()):
        return
    net = copy.deepcopy(trial.net).double()
    example = trial.example.to(torch.float64)
    params: dict[str, torch.Tensor] = {n: p for n, p in net.named_parameters() if p.requires_grad}

    def value() -> torch.Tensor:
        return trial.evaluate(net, example).reduced

    try:
        _stand_still(net, example)
        slope, differences = _compared(trial, value, params)
    except FAILURES as failure:
        said = str(failure).strip().splitlines()[0]
        yield Finding("call", "note", f"no copy in float64 could be compared ({said})")
        return
    near = abs(differences[0] - differences[1]) <= TOLERANCE * abs(differences[1])
    if near and abs(differences[1] - slope) > 10 * TOLERANCE * abs(differences[1]):
        why = (
            f"the gradient of the penalty is wrong: along one direction it is {slope:.4g}, and "
            f"differences of the penalty's value give {differences[1]:.4g}"
        )
        fix = (
            "is there a custom autograd Function, a .detach() or .data, or a compiled or scripted "
            "norm layer in the net? Or use estimator='finite_difference'"
        )
        yield Finding("wrong-derivative", "error", why, fix)


def _stand_still(net: torch.nn.Module, example: Example) -> None:
    """Put modules whose buffers move in a forward pass in eval mode, except batch norm."""

    def buffers() -> dict[torch.nn.Module, list[torch.Tensor]]:
        own = {m: list(m.buffers(recurse=False)) for m in net.modules() if m.training}
        return {m: [b.clone() for b in bs] for m, bs in own.items() if bs}

    before = buffers()
    with torch.no_grad():
        example.run(net)
    for module, now in buffers().items():
        moved = not all(map(torch.equal, before[module], now))
        if moved and not hasattr(module, "track_running_stats"):
            module.eval()


def _compared(
    trial: Trial, value: Callable[[], torch.Tensor], params: dict[str, torch.Tensor]
) -> tuple[float, list[float]]:
    """Return the slope of a value along a direction, by its gradient and by differences."""
    found = trial.gradients_of(value(), params)
    rng = torch.Generator().manual_seed(SEED)
    length = norm_of(found.values())
    directions = {}
    for name, p in params.items():
        noise = torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.device)
        own = found[name]
        directions[name] = noise * p.detach().square().mean().sqrt().clamp(min=1e-3)
        directions[name] = directions[name] + (0 if own is None else own.detach() / length)
    slope = sum(
        float((own.detach() * directions[name]).sum())
        for name, own in found.items()
        if own is not None
    )
    differences = []
    for h in STEPS:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, p in params.items():
                    p.add_(directions[name], alpha=sign * h)
            values.append(float(value().detach()))
            with torch.no_grad():
                for name, p in params.items():
                    p.sub_(directions[name], alpha=sign * h)
        differences.append((values[0] - values[1]) / (2 * h))
    return slope, differences
