"""Check that a penalty depends on a trained parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gpkit.autodiff import graph
from gpkit.axes.wrt import Variables
from gpkit.estimators.base import Target
from gpkit.formula import Terms


def trains(terms: Terms, targets: Sequence[Target], order: int, wrt: Variables) -> bool:
    """Return whether a penalty depends on a trained parameter.

    Args:
        terms: the terms of an evaluation, with their graph.
        targets: the differentiated outputs.
        order: k, the order of the derivative.
        wrt: the variables of the derivative.

    Returns:
        True if it does; False if the outputs do not depend on any trained parameter either: then
        the caller only wants the value.

    Raises:
        RuntimeError: if the outputs depend on trained parameters and the penalty does not.
    """
    given = [x for t in targets for x in t.xs] if wrt.batched else []

    def trained(tensor: Tensor) -> bool:
        return any(not any(p is x for x in given) for p in graph.leaves(tensor))

    kink = None
    if order > 1 and not terms.norms.any():
        kink = next(filter(None, (graph.piecewise_linear(t.y) for t in targets)), None)
    if trained(terms.reduced) and not kink:
        return True
    if not any(trained(t.y) for t in targets):
        return False  # no trained parameters: the caller only wants the value
    if not any(graph.depends(t.y, x) for t in targets for x in t.xs):
        kind = type(wrt).__name__
        cause = f"what it differentiates does not depend on the {kind}: {wrt.missing}"
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
