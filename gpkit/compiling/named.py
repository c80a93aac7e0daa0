"""Penalties by name in a compiled loss, as Lightning modules and the callback have them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from gpkit.autodiff.tracing.compat import keeping_buffers
from gpkit.compiling.loss import CompiledLoss
from gpkit.formula import Terms


def begin(penalties: Mapping[str, Any], step: int | None) -> None:
    """Let penalties count from an optimiser step; None is from their own."""
    for penalty in penalties.values():
        penalty.step = penalty.step if step is None else step


def terms_of(
    penalties: Mapping[str, Any], run: CompiledLoss, reduced: Mapping[str, Tensor | None]
) -> dict[str, Terms | None]:
    """Return the terms of the latest step of a compiled loss by name, with graphs.

    Args:
        penalties: by name, in the order in which the loss calls them.
        run: the compiled loss.
        reduced: the value of each penalty without its weight, which the loss returned.
    """
    named: Any = zip(penalties, run.terms, strict=True)
    return {name: own and replace(own, reduced=reduced[name]) for name, own in named}


def keeping(penalties: Mapping[str, Any], run: CompiledLoss | None) -> AbstractContextManager[Any]:
    """Return a context in which weights may measure the gradients of a compiled loss."""
    several = run is not None and any(p.measures for p in penalties.values())
    return keeping_buffers() if several else nullcontext()
