"""What keeps gradient norms of a LightningModule from the log, told before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from gpkit import checks
from gpkit.lightning.compat import is_a
from gpkit.lightning.refusals import refuse
from gpkit.lightning.watch.replay import loss_of

SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


REFUSAL_TITLE = "GradientNormMonitor has no norms to log"


def findings_of_module(module: Any) -> Iterator[str]:
    """Yield what is found of a module that logs norms of its own."""
    if is_a(module, "PenalizedModule") and module.gradient_norms:
        yield (
            "the PenalizedModule logs norms under the same names: PenalizedModule(..., "
            "gradient_norms=False), or leave out the monitor"
        )


def findings_of_strategy(strategy: Any, *, reads: bool, differentiates: bool) -> Iterator[str]:
    """Yield what is found of the trainer's strategy.

    Args:
        strategy: of the trainer.
        reads: whether the gradients of the parameters are read.
        differentiates: whether a loss is differentiated beside the training.

    Yields:
        A line for each finding.
    """
    kind = type(strategy).__name__
    if reads and is_a(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        yield (
            f"a {kind} keeps pieces of gradients that belong to no parameter: use strategy='ddp' "
            "or a ModelParallelStrategy, or weights=None"
        )
    if differentiates and is_a(strategy, *SHARDING_STRATEGIES):
        yield (
            f"a {kind} gathers parameters for one backward pass a step, and inputs, activations "
            "and validation take another: leave them out"
        )


def findings_of_names(module: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield the names that no submodule has, with the nearest one."""
    options = [name for name, _ in module.named_modules()]
    for name in dict.fromkeys(names):
        if name not in options:
            hint = checks.nearest(name, filter(None, options))
            listed = ", ".join(repr(n) for n, _ in module.named_children())
            yield f"there is no submodule {name!r}{hint}; there are {listed}"


def findings_of_manual_backward(
    module: Any, which: int | None, *, differentiates: bool
) -> Iterator[str]:
    """Yield what is found of the choice of a backward call under manual optimisation."""
    if module.automatic_optimization and which is not None:
        yield "`manual_backward=...` is for manual optimisation; leave it out"
    if differentiates and not module.automatic_optimization and which is None:
        yield (
            "the module optimises manually: say which of the manual_backward calls of a training "
            "step has the loss, manual_backward=0 for the first"
        )


def validation_loss(output: Any) -> Tensor:
    """Return the loss of what a validation step gave, or refuse."""
    loss = loss_of(output)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        found = "has no graph" if isinstance(loss, Tensor) else f"is {loss!r}"
        line = (
            f"the loss that validation_step returns {found}: return it, as a tensor or as the "
            "'loss' of a dict, or leave out validation=True"
        )
        refuse(REFUSAL_TITLE, [line])
    assert loss is not None
    return loss
