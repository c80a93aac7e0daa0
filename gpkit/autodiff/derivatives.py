"""Derivatives of an existing graph: of any order, differentiable or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from gpkit.autodiff import graph
from gpkit.autodiff.compat import LEAF, class_of, hooks_on, packs_saved, saved, saved_input
from gpkit.autodiff.numerics import as_real, dense, widened, without_autocast
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.sharding.gathering import regathered
from gpkit.hints import ExplainedError

MAX_PASSES = 10_000


def derivative_rows(
    y: Tensor, xs: tuple[Tensor, ...], order: int, *, batched: bool
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the k-th derivative of ``y``, row by row; each entry is in one row.

    Args:
        y: ``[G, m]``, for G groups.
        xs: the variables: ``[G, *S]`` each if ``batched``, else any shapes and G = 1.
        order: k >= 1.
        batched: whether group g of ``y`` depends on ``x[g]`` only.

    Yields:
        The gradient of one entry of the derivative of order k - 1: ``[G, n]`` for each variable.

    Raises:
        ValueError: if more than ten thousand backward passes would be needed.
    """
    n = 0 if order == 1 else sum(x.shape[batched:].numel() for x in xs)
    passes = y.shape[1] * n ** (order - 1)
    if passes > MAX_PASSES:
        raise ValueError(
            f"the exact derivative of order {order} of {y.shape[1]} output(s) in {n} variables "
            f"takes {passes} backward passes, over the limit of {MAX_PASSES}; "
            "use estimator='projection'"
        )
    for column in y.unbind(1) if y.shape[1] > 1 else [y]:
        total = column.sum() if column.numel() != 1 else column
        rows = tuple(as_rows(g, batched) for g in gradients(total, xs))
        if order == 1:
            yield rows
        else:
            yield from derivative_rows(torch.cat(rows, 1), xs, order - 1, batched=batched)


def as_rows(x: Tensor, batched: bool) -> Tensor:
    """Return ``x`` as ``[G, n]``: one row per sample, or a single row if not ``batched``.

    A complex ``x`` gives 2n real entries, see `as_real`.
    """
    if x.is_complex():
        x = as_real(x).reshape(len(x) if batched else 1, -1)
    if batched and x.ndim == 2:
        return x
    return x.flatten(1) if batched and x.ndim > 1 else x.reshape(len(x) if batched else 1, -1)


class unhooked:
    """A context in which gradients do not pass through the hooks on leaf tensors.

    A hook on a parameter, of ``Tensor.register_hook``, is for the gradient that trains. Torch calls
    it for each gradient in the parameter, also for one that a penalty differentiates or adds up.

    Args:
        tensors: of which leaves have no hooks meanwhile. A hook on another tensor is a part of the
            graph.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        leaves: Iterable[Any] = () if is_compiling() else (x for x in tensors if x.is_leaf)
        self.hooks = [(own, [*own.items()]) for own in filter(None, map(hooks_on, leaves))]

    def __enter__(self) -> None:
        for own, _ in self.hooks:
            own.clear()

    def __exit__(self, *exception: object) -> None:
        for own, kept in self.hooks:
            own.update(kept)


def gradients(y: Tensor, xs: tuple[Tensor, ...], times: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return dy/dx for each x, differentiable; zeros where y does not depend on x.

    Args:
        y: one number.
        xs: the variables.
        times: a constant factor of the gradients, in the shape of y; None is 1.

    Returns:
        A tensor in the shape of each x.

    Raises:
        ExplainedError: if an operation has no derivative of this order; it says what to do.
    """
    if not y.requires_grad:
        return tuple(torch.zeros_like(x) for x in xs)
    kind = y.device.type
    if torch.is_autocast_enabled(kind):  # autocast would round the backward pass once more
        with torch.autocast(kind, enabled=False):
            return gradients(y, xs, times)
    grads: tuple[Tensor | None, ...]
    try:
        with unhooked(xs):
            grads = torch.autograd.grad(y, xs, times, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ExplainedError(error) from error
    grads = regathered(y, grads) if has_ranks() else grads
    return dense(grads, xs)


def gradients_at(y: Tensor, edges: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a sum at edges of its graph, differentiable, None if unused.

    Args:
        y: whose sum is differentiated.
        edges: from `torch.autograd.graph.get_gradient_edge`, or tensors.

    Returns:
        A gradient for each edge.

    Raises:
        ExplainedError: if an operation has no derivative; the message says what to do.
    """
    tensors = [x for x in edges if isinstance(x, Tensor)]
    with without_autocast(y), unhooked(tensors):
        try:
            ones = None if y.numel() == 1 else torch.ones_like(y)
            return torch.autograd.grad(y, edges, ones, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise ExplainedError(error) from error


def first_gradients(
    y: Tensor, xs: tuple[Tensor, ...], *, retain: bool = True
) -> tuple[Tensor | None, ...]:
    """Return dy/dx for each x, not differentiable; None where y does not depend on x.

    Args:
        y: the output; its sum is differentiated.
        xs: the variables.
        retain: whether to keep the graph of y. A compiled graph may not allow it.

    Returns:
        The gradients.

    Raises:
        ExplainedError: if an operation has no derivative; the message says what to do.
    """
    if not y.requires_grad:
        return (None,) * len(xs)
    with without_autocast(y), unhooked(xs):
        try:
            total = y if y.ndim == 0 else y.sum()
            grads = torch.autograd.grad(total, xs, retain_graph=retain, allow_unused=True)
        except RuntimeError as error:
            raise ExplainedError(error) from error
    return tuple(g.to_dense() if g is not None and g.is_sparse else g for g in grads)


def products(
    outputs: Sequence[Tensor], xs: tuple[Tensor, ...], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return d⟨outputs, vectors⟩/dx for each x, not differentiable; zeros if independent of x."""
    pairs = [(y, v) for y, v in zip(outputs, vectors, strict=True) if y.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(xs)
    if pairs:
        ys, vs = zip(*pairs, strict=True)
        with without_autocast(ys[0]), unhooked(xs):
            try:
                grads = torch.autograd.grad(ys, xs, vs, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise ExplainedError(error) from error
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]


def gradient_norm(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return the norm of the gradient in all parameters together, not differentiable."""
    with unhooked(parameters):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    squares = [as_real(widened(g.detach())).square().sum() for g in grads if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else value.new_zeros(())


@contextmanager
def mended(*ys: Tensor) -> Iterator[None]:
    """A context in which some gradients in the graph of ``ys`` can be differentiated again.

    torch's second derivative of Mish is NaN from 89 on in float32 (710 in float64), where it
    multiplies an infinity by zero. That of weight norm takes ‖v‖ for a constant, so it is wrong in
    v. Here their nodes give their gradients by the formulas in `MENDED`. The graph stays as it was.

    >>> import gpkit
    >>> x = torch.tensor([100.0], requires_grad=True)
    >>> gpkit.derivative(F.mish(x), x, order=2).tolist()
    [0.0]

    Args:
        *ys: the outputs, whose gradients are taken in this context, with create_graph.

    Yields:
        Nothing.
    """
    found = [] if torch.compiler.is_compiling() else [n for y in ys for n in graph.nodes(y)]
    handles = [hook(node) for node in found if class_of(node) in MENDED]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook(node: Any) -> Any:
    """Let a node give its gradients by its formula in `MENDED`."""

    def gradient(given: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]) -> Any:
        found = MENDED[class_of(node)](node, grads[0])
        pairs = zip(given, found or given, strict=True)
        return tuple(None if before is None else after for before, after in pairs)

    return node.register_hook(gradient)


def slope(x: Tensor) -> Tensor:
    r"""Return the derivative of Mish, x tanh(softplus x), differentiable any number of times.

    .. math:: t + x \, \sigma(x) (1 - t) (1 + t), \quad t = \tanh(-\log \sigma(-x))
    """
    t = torch.tanh(-F.logsigmoid(-x))
    return t + x * torch.sigmoid(x) * (1 - t) * (1 + t)


def through_mish(node: Any, grad: Tensor) -> tuple[Tensor] | None:
    """Return the gradient in x, for one in Mish of x. A checkpoint's x can be read once: None."""
    return None if packs_saved(node) else (grad * slope(saved_input(node)),)


def through_weight_norm(node: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients in v and g, for one in g v / ‖v‖: norms over all but one dimension."""
    leaves = [getattr(n, LEAF, None) for n, _ in node.next_functions]
    # What a node in a checkpoint has saved can be read once, by the node; leaves can be found.
    v, g = (saved(node, k) if x is None else x for k, x in zip("vg", leaves, strict=True))
    others = [d for d in range(v.ndim) if d != saved(node, "dim")]
    inverse = v.square().sum(others, keepdim=True).rsqrt()
    unit = v * inverse
    along = (grad * unit).sum(others, keepdim=True)
    return g * inverse * (grad - along * unit), along


WRONG_TWICE = "WeightNormInterfaceBackward0"
MENDED: dict[str, Callable[[Any, Tensor], tuple[Tensor, ...] | None]] = {
    "MishBackward0": through_mish,
    WRONG_TWICE: through_weight_norm,
}
