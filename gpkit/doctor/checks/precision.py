"""Check of float16: does the inner gradient underflow?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gpkit.autodiff.derivatives import first_gradients
from gpkit.autodiff.state import copied_net
from gpkit.doctor.trial import FAILURES, Trial
from gpkit.finding import Finding

LOST = 0.1  # the part of n² that may be lost


def underflow(trial: Trial) -> Iterator[Finding]:
    """Find an inner gradient that float16 would round to zero, or nearly so."""
    needs = trial.needs
    if needs is None or needs.environments or needs.order > 1 or trial.outcome.error:
        return
    dtypes = {p.dtype for p in trial.net.parameters()} | {trial.example.x.dtype}
    half = torch.float16 in dtypes or (
        torch.is_autocast_enabled(trial.device.type)
        and torch.get_autocast_dtype(trial.device.type) == torch.float16
    )
    wide = trial
    if torch.float16 in dtypes:
        net = copied_net(trial.net).float()
        wide = Trial(net, trial.name, trial.penalty, trial.example.to(torch.float32))
    try:
        targets = wide.graphs[0]
    except FAILURES:
        return  # `refusal` says why
    own = rounded = largest = 0.0
    for target in targets if targets[0].batched else targets[:1]:
        for g in first_gradients(target.y, target.xs):
            if g is not None:
                own += float(g.double().square().sum())
                rounded += float(g.half().double().square().sum())
                largest = max(largest, float(g.abs().max()))
    if not 0 < own < math.inf or abs(rounded - own) <= LOST * own:
        return
    scale = 2.0 ** math.floor(math.log2(1.0 / largest))
    lost = "overflows" if rounded > own else f"loses {1 - rounded / own:.0%} of n²"
    why = f"the inner gradient, {largest:.1e} at most, {lost} in float16"
    fix = (
        f"penalty(..., scale={scale:g}) with a scaled loss, as Lightning's 16-mixed has it, or "
        "bfloat16"
    )
    yield Finding("float16-underflow", "warning" if half else "note", why, fix)
