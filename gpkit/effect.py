"""The proof that a penalty acts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gpkit import graphs
from gpkit.targets import Target
from gpkit.terms import Terms
from gpkit.variables import weights

if TYPE_CHECKING:
    from gpkit.penalty import GradientPenalty


def acts(penalty: GradientPenalty, terms: Terms, targets: list[Target]) -> bool:
    """Return whether a penalty trains something, or refuse it if there is something to train.

    Args:
        penalty: what was evaluated.
        terms: of an evaluation whose graph is there.
        targets: what it differentiated.

    Returns:
        False where nothing is being trained at all.

    Raises:
        RuntimeError: if parameters are being trained, and the penalty depends on none of them.
    """
    given = [] if isinstance(penalty.wrt, weights) else [x for t in targets for x in t.xs]

    if not penalty.estimator.first_order:
        graphs.require_derivatives(targets[0].y, targets[0].xs, penalty.order + 1)

    def trained(tensor: Tensor) -> list[Tensor]:
        return [p for p in graphs.leaves(tensor) if not any(p is x for x in given)]

    kink = None
    if penalty.order > 1 and not terms.norms.any():
        kink = next(filter(None, (graphs.piecewise_linear(t.y) for t in targets)), None)
    if trained(terms.reduced) and not kink:
        return True
    if not any(trained(t.y) for t in targets):
        return False  # nothing is being trained: the value was asked for, and here it is
    if not any(graphs.depends(t.y, x) for t in targets for x in t.xs):
        kind = type(penalty.wrt).__name__
        cause = f"what it differentiates does not depend on the {kind}: {penalty.wrt.missing}"
    elif kink:
        cause = (
            f"order {penalty.order} of a piecewise-linear net ({kink}) is zero everywhere: use a "
            "smooth activation (GELU, SiLU, softplus, tanh), or order=1"
        )
    else:
        cause = (
            f"the derivative of order {penalty.order} is constant in them. Is the function linear "
            "or a polynomial of that degree, or does it hold a gradient taken without "
            "create_graph=True, a detach, or reentrant checkpointing?"
        )
    raise RuntimeError(f"the penalty depends on no parameter that is trained: {cause}")
