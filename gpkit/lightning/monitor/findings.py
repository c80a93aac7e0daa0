"""Checks of a `GradientNormMonitor` before the first step: every reason why a norm is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gpkit import checks
from gpkit.lightning.compat import is_a

SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def findings_of_module(module: Any) -> Iterator[str]:
    """Yield a finding if the module logs norms under the same names."""
    if is_a(module, "PenalizedModule") and module.gradient_norms:
        yield (
            "PenalizedModule logs norms under the same names: use PenalizedModule(..., "
            "gradient_norms=False), or leave out the monitor"
        )


def findings_of_strategy(strategy: Any, *, reads: bool, differentiates: bool) -> Iterator[str]:
    """Yield the findings about the strategy of the trainer.

    Args:
        strategy: of the trainer.
        reads: whether the monitor reads the gradients of the parameters.
        differentiates: whether the monitor differentiates a loss in a backward pass of its own.

    Yields:
        One line for each finding.
    """
    kind = type(strategy).__name__
    if reads and is_a(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        yield (
            f"{kind} keeps pieces of gradients that belong to no single parameter: use "
            "strategy='ddp' or a ModelParallelStrategy, or weights=None"
        )
    if differentiates and is_a(strategy, *SHARDING_STRATEGIES):
        yield (
            f"{kind} gathers parameters for one backward pass a step, and the norms of inputs, "
            "activations and at validation take another: leave these out"
        )


def findings_of_names(module: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield a finding for each name that no submodule has, with the nearest name."""
    options = [name for name, _ in module.named_modules()]
    for name in dict.fromkeys(names):
        if name not in options:
            hint = checks.nearest(name, filter(None, options))
            listed = ", ".join(repr(n) for n, _ in module.named_children())
            yield f"there is no submodule {name!r}{hint}; there are {listed}"


def findings_of_manual_backward(
    module: Any, which: int | None, *, differentiates: bool
) -> Iterator[str]:
    """Yield the findings about the argument ``manual_backward``.

    Args:
        module: the LightningModule.
        which: the argument.
        differentiates: whether the monitor logs norms of inputs or activations.

    Yields:
        One line for each finding.
    """
    if module.automatic_optimization and which is not None:
        yield "`manual_backward=...` is for manual optimisation; leave it out"
    if differentiates and not module.automatic_optimization and which is None:
        yield (
            "the module optimises manually: say which of the manual_backward calls of a training "
            "step has the loss, with manual_backward=0 for the first"
        )
