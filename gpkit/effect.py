"""The check that a penalty depends on a parameter that is being trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gpkit.autodiff import graph
from gpkit.estimators.base import Target
from gpkit.formula import Terms


def trains(terms: Terms, targets: Sequence[Target], order: int, unused: str) -> bool:
    """Return whether a penalty trains something.

    Args:
        terms: of an evaluation, with their graph.
        targets: what was differentiated.
        order: k, of the derivative.
        unused: what to say where nothing depends on the variables.

    Returns:
        False where nothing is being trained at all.

    Raises:
        RuntimeError: if parameters are being trained, and the penalty depends on none of them.
    """
    given = [x for t in targets for x in t.xs if t.batched]

    def trained(tensor: Tensor) -> bool:
        return any(not any(p is x for x in given) for p in graph.leaves(tensor))

    kink = None
    if order > 1 and not terms.norms.any():
        kink = next(filter(None, (graph.piecewise_linear(t.y) for t in targets)), None)
    if trained(terms.reduced) and not kink:
        return True
    if not any(trained(t.y) for t in targets):
        return False  # nothing is being trained: the value was asked for, and here it is
    if not any(graph.depends(t.y, x) for t in targets for x in t.xs):
        cause = f"what it differentiates does not depend on the {unused}"
    elif kink:
        cause = (
            f"order {order} of a piecewise-linear net ({kink}) is zero everywhere: use a smooth "
            "activation (GELU, SiLU, softplus, tanh), or order=1"
        )
    else:
        cause = (
            f"the derivative of order {order} is constant in them. Is the function linear or a "
            "polynomial of that degree, or does it hold a gradient taken without "
            "create_graph=True, a detach, or reentrant checkpointing?"
        )
    raise RuntimeError(f"the penalty depends on no parameter that is trained: {cause}")
