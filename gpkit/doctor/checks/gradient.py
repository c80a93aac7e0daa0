"""Check of the penalty's gradient in the parameters: is it that of the penalty's value?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.state import in_double
from gpkit.doctor.example import Example
from gpkit.doctor.trial import FAILURES, SEED, Trial, norm_of
from gpkit.environment_penalty import EnvironmentPenalty
from gpkit.estimators.exact import exact
from gpkit.estimators.projection import projection
from gpkit.finding import Finding

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
    net = in_double(trial.net)
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
    if not _differ(slope, differences):
        return
    numbers = (
        f"along one direction it is {slope:.4g}, and differences of the penalty's value give "
        f"{differences[1]:.4g}"
    )
    if _loss_differs(trial, net, example, params):
        why = (
            "the net stops gradients, as .detach(), no_grad() or a straight-through estimate do: "
            "neither the loss's gradient nor the penalty's is that of its value. Of the penalty, "
            f"{numbers}"
        )
        yield Finding("wrong-derivative", "warning", why, "leave it if that is meant")
        return
    fix = (
        "is there a custom autograd Function, a .detach() or .data, or a compiled or scripted "
        "norm layer in the net? Or use estimator='finite_difference'"
    )
    why = f"the gradient of the penalty is wrong: {numbers}"
    yield Finding("wrong-derivative", "error", why, fix)


def _differ(slope: float, differences: list[float]) -> bool:
    """Whether differences agree with each other, and not with a slope."""
    one, two = differences
    near = abs(one - two) <= TOLERANCE * abs(two)
    return near and abs(two - slope) > 10 * TOLERANCE * abs(two)


def _loss_differs(
    trial: Trial, net: torch.nn.Module, example: Example, params: dict[str, torch.Tensor]
) -> bool:
    """Whether the gradient of the loss is not that of its value either."""

    def value() -> torch.Tensor:
        with isolated(net, SEED, trial.device, twice=False):
            return example.training_loss(net)

    try:
        return _differ(*_compared(trial, value, params))
    except FAILURES:
        return False  # no loss fits the example


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
        noise = torch.randn(p.shape, generator=rng, dtype=p.dtype).to(p.device)
        own = found[name]
        directions[name] = noise * p.detach().abs().square().mean().sqrt().clamp(min=1e-3)
        directions[name] = directions[name] + (0 if own is None else own.detach() / length)
    slope = sum(
        float((own.detach().conj() * directions[name]).sum().real)
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
