"""Checks of a `GradientNormMonitor` before the first step: every reason why a norm is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpkit.checks import is_a
from gpkit.finding import Finding, error
from gpkit.findings.trainer import finding_of_name, may_shard


def findings_of_monitor(trainer: Any, module: Any, monitor: Any, *, own: bool) -> Iterator[Finding]:
    """Yield the findings that need no step: about the module, the strategy and the names.

    Args:
        trainer: the trainer of the fit.
        module: the LightningModule.
        monitor: the `GradientNormMonitor`.
        own: whether it differentiates a loss in a backward pass of its own.

    Yields:
        Each finding.
    """
    if is_a(module, "PenalizedModule") and module.gradient_norms:
        yield error(
            "trainer",
            "PenalizedModule logs norms under the same names: use PenalizedModule(..., "
            "gradient_norms=False), or leave out the monitor",
        )
    strategy = trainer.strategy
    yield from findings_of_strategy(strategy, reads=monitor.weights is not None, own=own)
    options = {name for name, _ in module.named_modules()}
    for name in dict.fromkeys([*monitor.inputs, *monitor.activations]):
        if name not in options:
            yield finding_of_name(module, name)


def findings_of_strategy(strategy: Any, *, reads: bool, own: bool) -> Iterator[Finding]:
    """Yield the findings about the strategy of the trainer.

    Args:
        strategy: of the trainer.
        reads: whether the monitor reads the gradients of the parameters.
        own: whether the monitor differentiates a loss in a backward pass of its own.

    Yields:
        Each finding.
    """
    kind = type(strategy).__name__
    if reads and is_a(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        yield error(
            "trainer",
            f"{kind} keeps pieces of gradients that belong to no single parameter: use "
            "strategy='ddp' or a ModelParallelStrategy, or weights=None",
        )
    if own and may_shard(strategy):
        yield error(
            "trainer",
            f"{kind} gathers parameters for one backward pass a step, and the norms of inputs, "
            "activations and at validation take another: leave these out",
        )
