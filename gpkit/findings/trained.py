"""Does a penalty train anything? Asked for each net that a penalty meets, at its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.autodiff.compat import base_of, packs_saved, saved
from gpkit.autodiff.derivatives import first_gradients
from gpkit.autodiff.reached import reached
from gpkit.axes.wrt import Variables
from gpkit.estimators.base import Target
from gpkit.finding import Finding, FoundError, error
from gpkit.findings.compat import made_at
from gpkit.findings.derivatives import has_no_curvature, not_finite_derivative
from gpkit.findings.samples import UNTRAINED, require_independent_samples
from gpkit.formula import Terms


def trains(
    f: Any, terms: Terms, targets: Sequence[Target], order: int, wrt: Variables, *, twice: bool
) -> bool:
    """Return whether a penalty depends on a trained parameter.

    Args:
        f: what the penalty was called with.
        terms: the terms of an evaluation, with their graph.
        targets: the differentiated outputs.
        order: k, the order of the derivative.
        wrt: the variables.
        twice: whether the penalty's backward pass goes through derivatives.

    Returns:
        True if it does; False if the outputs do not depend on any trained parameter either: then
        the caller only wants the value.

    Raises:
        UntrainedError: if the outputs depend on trained parameters and the penalty does not, if all
            parameters are frozen, or if the penalty has no gradient or one that is not finite.
    """
    given = [x for t in targets for x in t.xs if t.batched]

    def trained(tensor: Tensor) -> list[Tensor]:
        return [p for p in graph.leaves(tensor) if not any(p is x for x in given)]

    kink = None
    if not terms.norms.any():
        kink = next(filter(None, (has_no_curvature(t.y, order) for t in targets)), None)
    if trained(terms.reduced) and not kink:
        for target in targets:
            require_independent_samples(target, terms)
        if twice:
            require_gradient(terms.reduced, trained(terms.reduced), targets, order + 1)
        return True
    if not any(trained(t.y) for t in targets):
        if is_frozen(f, targets):
            raise UntrainedError(
                "frozen",
                "all parameters of the net are frozen: call net.requires_grad_(True), "
                "or use torch.no_grad() if only the value is wanted",
            )
        return False  # no trained parameters: the caller only wants the value
    if not any(graph.depends(t.y, x) for t in targets for x in t.xs):
        what = f"{type(wrt).__name__}: {wrt.missing}"
        cause = f"the differentiated output does not depend on the {what}"
    elif kink:
        cause = (
            f"order {order} of a piecewise-linear net ({kink}) is zero everywhere: use a smooth "
            "activation (GELU, SiLU, softplus, tanh), or order=1"
        )
        if order == 1:
            cause = (
                f"the expression holds derivatives of a piecewise-linear net ({kink}), and the "
                "next one is zero everywhere: use a smooth activation (GELU, SiLU, softplus, tanh)"
            )
    else:
        cause = (
            f"the derivative of order {order} does not depend on them. Is the function linear or a "
            "polynomial of that degree, or does it use a gradient taken without "
            "create_graph=True, a detached tensor, or reentrant checkpointing?"
        )
    raise UntrainedError("piecewise-linear" if kink else "untrained", cause)


class UntrainedError(FoundError):
    """A penalty trains nothing.

    Args:
        code: of the finding.
        cause: "why: fix".
    """

    def __init__(self, code: str, cause: str) -> None:
        found = error(code, cause)
        super().__init__(replace(found, why=UNTRAINED + found.why))


def is_frozen(f: Any, targets: Sequence[Target]) -> bool:
    """Whether a net with parameters was run, and none of them requires grad."""
    if not callable(f) or isinstance(f, Tensor):
        return any(_saves_parameters(node) for t in targets for node in graph.nodes(t.y))
    modules = [f] if isinstance(f, nn.Module) else reached(f)[0]
    parameters = [p for module in modules for p in module.parameters()]
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _saves_parameters(node: Any) -> bool:
    """Whether an operation has saved a parameter or a view of one, as those of a frozen net do."""
    if packs_saved(node):
        return False
    names = [n.removeprefix("_saved_") for n in dir(node) if n.startswith("_saved_")]
    found = [value for name in names if isinstance(value := saved(node, name), Tensor)]
    return any(isinstance(t, nn.Parameter) for x in found for t in (x, base_of(x)))


def require_gradient(
    penalty: Tensor, leaves: Sequence[Tensor], targets: Sequence[Target], order: int
) -> None:
    """Take the gradient of a penalty once, to find what has none before the user's backward pass.

    Args:
        penalty: the number.
        leaves: the trained parameters.
        targets: what it differentiates.
        order: the number of derivatives with that gradient.

    Raises:
        FoundError: if an operation has no second derivative, or the gradient is not finite.
    """
    if not penalty.requires_grad:
        return
    grads = first_gradients(penalty, tuple(leaves))
    if penalty.isfinite() and not all(g.isfinite().all() for g in grads if g is not None):
        why = "the gradient of the penalty is not finite, though its value is"
        fix = "is there a root or a norm of something that is zero?"
        nodes = sorted({n for t in targets for n in graph.nodes(t.y)}, key=made_at)
        found = next(filter(None, (not_finite_derivative(n, order) for n in nodes)), None)
        if found is not None:
            why, fix = f"{why}; {found.why}", found.fix
        raise FoundError(Finding("not-finite", "error", why, fix))
