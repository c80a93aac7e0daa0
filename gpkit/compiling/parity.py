"""Is a compiled loss equal to the eager one, and is it faster?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.autodiff.compat import tree_leaves

ROUNDS = 3


@dataclass(frozen=True)
class Outcome:
    """The result of a loss, and its gradients.

    Args:
        values: the tensors of the result.
        grads: of their sum, in each leaf; None where it does not reach.
        seconds: how long it took.
    """

    values: list[Tensor]
    grads: dict[Tensor, Tensor | None]
    seconds: float


def total_of(result: Any) -> Tensor | None:
    """Return the sum of all that requires grad in a result; None if nothing does."""
    parts = [t.sum() for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    return sum(parts[1:], parts[0]) if parts else None


def outcome_of(
    run: Callable[[], Any], leaves: Sequence[Tensor] | None, *, retain: bool = False
) -> Outcome:
    """Run a loss, and take its gradients, without a change of any ``.grad``.

    Args:
        run: returns the result.
        leaves: of the gradients; None are those in the graph.
        retain: whether the graph is needed again.

    Returns:
        The outcome.
    """
    synchronize()
    start = time.perf_counter()
    result = run()
    total = total_of(result)
    leaves = leaves_of(result) if leaves is None else leaves
    grads: Sequence[Tensor | None] = []
    if total is not None and leaves:
        grads = torch.autograd.grad(total, leaves, retain_graph=retain, allow_unused=True)
    synchronize()
    values = [t.detach() for t in tree_leaves(result) if isinstance(t, Tensor)]
    return Outcome(values, dict(zip(leaves, grads, strict=True)), time.perf_counter() - start)


def leaves_of(result: Any) -> list[Tensor]:
    """Return the leaves of a result that require grad."""
    total = total_of(result)
    return [] if total is None else graph.leaves(total)


def synchronize() -> None:
    """Wait until the accelerator has done all, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def difference(eager: Outcome, compiled: Outcome) -> tuple[float, float]:
    """Return the relative differences of the values and of the gradients, each over all entries."""
    if len(eager.values) != len(compiled.values):
        return float("inf"), float("inf")
    # Points that a penalty makes are leaves of the eager graph alone.
    shared = [x for x in eager.grads if isinstance(x, nn.Parameter) or x in compiled.grads]
    pairs = [[run.grads.get(x) for run in (eager, compiled)] for x in shared]
    filled = [
        [torch.zeros_like(x) if g is None else g for g in pair]
        for x, pair in zip(shared, pairs, strict=True)
    ]
    return relative(zip(eager.values, compiled.values, strict=True)), relative(filled)


def relative(pairs: Any) -> float:
    """Return ‖a - b‖ / ‖a‖ over all entries of pairs of tensors.

    NaN and infinity are equal, and infinitely far from numbers.
    """
    own = apart = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        a, b = a.detach().double(), b.detach().double()
        same = (a == b) | (~a.isfinite() & ~b.isfinite())
        own += float(torch.where(same & ~a.isfinite(), 0.0, a).square().sum())
        apart += float(torch.where(same, 0.0, a - b).square().sum())
    found = (apart / own) ** 0.5 if own else apart**0.5
    return found if found == found else float("inf")


def rounding(outcome: Outcome) -> float:
    """Return the relative difference of one rounding, in the coarsest dtype of an outcome."""
    dtypes = {t.dtype for t in (*outcome.values, *outcome.grads)}
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    floating = [torch.finfo(d).eps for d in dtypes if d.is_floating_point]
    return max(floating, default=0.0)


CLOSE = 8  # roundings; in float32 1e-6
FACTOR = 16  # of what the rounding of weights changes, for the rounding of all operations


def allowed(outcome: Outcome, again: Callable[[], Any] | None) -> float:
    """Return the relative difference that rounding explains, where it is not `CLOSE`.

    Where large terms cancel, as in a gradient near a minimum, rounding changes more. So the loss is
    run once more, with weights that differ by one rounding, and compared with itself. It is never
    more than the root of one rounding.

    Args:
        outcome: of the eager loss.
        again: runs it again, from the same start; None if it must not be run again.
    """
    epsilon = rounding(outcome)
    if again is None:
        return float(epsilon**0.5)
    leaves = [x for x in outcome.grads if isinstance(x, nn.Parameter)]
    weights = [x.data for x in leaves]  # writes to them are not counted
    before = [w.clone() for w in weights]
    try:
        for w in filter(torch.is_floating_point, weights):
            signs = torch.arange(w.numel(), device=w.device).remainder(2).mul(2).sub(1)
            w += epsilon * signs.reshape(w.shape).to(w.dtype) * w
        rounded = outcome_of(again, leaves)
    finally:
        for w, kept in zip(weights, before, strict=True):
            w.copy_(kept)
    apart = max(difference(outcome, rounded))
    return min(float(epsilon**0.5), max(CLOSE * epsilon, FACTOR * apart))


def unlike(expected: Outcome, found: Outcome, again: Callable[[], Any] | None) -> str | None:
    """Return in words how a compiled loss differs from the eager one; None if it does not.

    Args:
        expected: of the eager loss.
        found: of the compiled one.
        again: runs the eager one again, see `allowed`.
    """
    value, gradient = difference(expected, found)
    apart, limit = max(value, gradient), CLOSE * rounding(expected)
    if apart <= limit or apart <= (limit := allowed(expected, again)):
        return None
    return (
        f"the compiled loss differs: its value by {value:.1e} and its gradient by "
        f"{gradient:.1e}, relative to the eager one, with {limit:.0e} allowed"
    )


def faster(eager: Callable[[], Any], compiled: Callable[[], Any], leaves: Sequence[Tensor]) -> Any:
    """Return the least times of both in seconds, (eager, compiled), of steps that take turns."""
    pairs = [[outcome_of(f, leaves).seconds for f in (eager, compiled)] for _ in range(ROUNDS)]
    return tuple(map(min, zip(*pairs, strict=True)))
