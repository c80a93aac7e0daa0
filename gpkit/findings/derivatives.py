"""Which operations of a graph cannot be differentiated again, or have a wrong derivative."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gpkit.autodiff import compat, graph
from gpkit.finding import Finding, FoundError, error
from gpkit.findings.compat import is_compiled_node, ones_for
from gpkit.hints import HINTS, hint_for

# Operations with a zero second derivative: if a net has no others, an order >= 2 penalty is zero.
PIECEWISE_LINEAR = (
    "Relu",
    "LeakyRelu",
    "Hardtanh",
    "Threshold",
    "PreluKernel",
    "RreluWithNoise",
    "Abs",
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Softshrink",
    "Hardshrink",
    "MaxPool2DWithIndices",
    "MaxPool3DWithIndices",
    "AdaptiveMaxPool2D",
    "Max",
    "Amax",
    "Maximum",
)


class NormLayerError(FoundError):
    """A derivative through a fused norm layer is wrong; elementary operations have a right one."""


def derivative_findings(
    y: Tensor, xs: tuple[Tensor, ...], order: int
) -> Iterator[tuple[Any, Finding]]:
    """Yield the operations of which torch has no derivative of that order, or a wrong one.

    torch does not always raise an error itself: it treats a backward marked @once_differentiable
    as a constant if its arguments are constants, and its layer norm and batch norm in training
    mode have a wrong third derivative (pytorch#175754).

    Args:
        y: the differentiated output.
        xs: the variables.
        order: the number of derivatives.

    Yields:
        The node between ``xs`` and ``y``, and what is known of it.
    """
    for node in graph.between(y, xs) if order >= 2 else ():
        name, key = node.name(), ""
        if compat.is_once_differentiable(node):
            key = "once_differentiable"
        elif compat.is_fused_attention(name):
            key = "scaled_dot_product"
        elif order >= (2 if compat.is_second_derivative(name) else 3) and (
            compat.is_layer_norm(name) or compat.uses_batch_statistics(node, name)
        ):
            key = "NativeLayerNorm"
        if key:
            yield node, error(*HINTS[key])


def require_derivatives(y: Tensor, xs: tuple[Tensor, ...], order: int) -> None:
    """Refuse a graph if torch has no derivative of that order through it, or a wrong one.

    Args:
        y: the differentiated output.
        xs: the variables.
        order: the number of derivatives.

    Raises:
        FoundError: if an operation between ``xs`` and ``y`` is known to have no correct
            derivative of that order; the message says what to do.
    """
    for node, found in derivative_findings(y, xs, order):
        kind = NormLayerError if found.code == "wrong-derivative" else FoundError
        raise kind(found, f"there is no derivative of order {order} through {node.name()}: {found}")


def has_no_curvature(y: Tensor, order: int) -> str | None:
    """Return the name of a piecewise-linear operation whose second derivative is taken, or None.

    Args:
        y: the output to differentiate; its graph may hold derivatives already.
        order: of the derivative of y.
    """
    found = list(graph.nodes(y))
    if order == 1 and not any(node.name().count("Backward") > 1 for node in found):
        return None
    names = set(map(compat.operation_of, found))
    return next((name for name in PIECEWISE_LINEAR if name in names), None)


def undifferentiable(node: Any) -> Finding | None:
    """Return what is wrong with the second derivative of one operation, by trying it.

    Args:
        node: of an autograd graph.

    Returns:
        None if nothing is.
    """
    if compat.is_reentrant_checkpoint(node):
        return error(*HINTS["use_reentrant=True"])
    if is_compiled_node(node):
        return error(*HINTS["torch.compile with aot_autograd"])
    if hasattr(node, "variable") or compat.packs_saved(node):
        return None  # a leaf; or a checkpoint, which can be read once
    given = ones_for(node)
    if not all(g.is_floating_point() for g in given):
        return None
    try:
        made = _backward_of(node, given)
        found = made if isinstance(made, tuple) else (made,)
        parts = [p for p in found if isinstance(p, Tensor) and p.requires_grad]
        if parts:
            ones = [torch.ones_like(p) for p in parts]
            torch.autograd.grad(parts, given, ones, allow_unused=True)
    except RuntimeError as failure:
        if "not implemented" not in str(failure) and hint_for(str(failure)) is None:
            return None  # it does not take ones, which says nothing of its derivative
        return hint_for(str(failure)) or error(*HINTS["is not implemented"])
    return None


def not_finite_derivative(node: Any, order: int) -> Finding | None:
    """Return which derivative of one operation is NaN or infinite, by trying it where it was made.

    Args:
        node: of an autograd graph.
        order: the number of derivatives that are taken.

    Returns:
        None if all are finite.
    """
    if hasattr(node, "variable") or compat.packs_saved(node):
        return None
    given = ones_for(node)
    if not all(g.is_floating_point() for g in given):
        return None
    edges = [GradientEdge(n, number) for n, number in node.next_functions if n is not None]
    parts: Any = ()
    for k in range(1, order + 1):
        try:
            parts = _backward_of(node, given) if k == 1 else _derived(parts, [*given, *edges])
        except RuntimeError:  # it does not take ones, or cannot be differentiated: other findings
            return None
        found = parts if isinstance(parts, tuple) else (parts,)
        parts = tuple(p for p in found if isinstance(p, Tensor) and p.is_floating_point())
        if not all(p.isfinite().all() for p in parts):
            which = ("first", "second", "third")[k - 1] if k < 4 else f"{k}-th"
            operation = compat.operation_of(node)
            why = f"the {which} derivative of {operation} is not finite where it is taken"
            fix = (
                "keep its input away from there: add an epsilon inside of a root or a norm of what "
                "may be zero, and scale what is large"
            )
            return Finding("not-finite", "error", why, fix)
    return None


def _backward_of(node: Any, given: list[Tensor]) -> Any:
    """Return what the backward pass of one node makes of tensors, with a graph."""
    if callable(node):
        return node(*given)
    # A custom Function's node cannot be called.
    outputs = [GradientEdge(node, number) for number in range(len(given))]
    edges = [GradientEdge(n, number) for n, number in node.next_functions if n is not None]
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True}
    return torch.autograd.grad(outputs, edges, given, **options)


def _derived(parts: tuple[Tensor, ...], variables: list[Any]) -> tuple[Any, ...]:
    """Return the gradient of the sum of all parts, with a graph."""
    live = [p for p in parts if p.requires_grad]
    if not live:
        return ()
    ones = [torch.ones_like(p) for p in live]
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True}
    return torch.autograd.grad(live, variables, ones, **options)
