"""Derivatives of an existing graph: of any order, differentiable or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.compat import LEAF, class_of, packs_saved, saved, saved_input
from gpkit.autodiff.numerics import as_real, dense, widened, without_autocast
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.sharding.gathering import regathered
from gpkit.hints import ExplainedError

MAX_PASSES = 10_000


def derivative(y: Tensor, x: Tensor, order: int = 1, *, squeeze: bool = False) -> Tensor:
    r"""Return the exact, differentiable k-th derivative of ``y`` with respect to ``x``, per sample.

    .. math:: (D^k y)_{b, s_1 \dots s_k} =
              \partial^k y_b \, / \, \partial x_{b s_1} \dots \partial x_{b s_k}

    Sample b of ``y`` must depend on sample b of ``x`` only; batch norm in training mode violates
    this. A zero derivative is returned as zeros, without an error: of a constant, of an unused
    variable, or of a polynomial above its degree. The full tensor takes 1 + n + ... + n^(k-1)
    backward passes, where n is the number of entries of one sample of ``x``.

    Args:
        y: the output to differentiate: ``[B]`` or ``[B, 1]``; or one number, ``[]``.
        x: the variable: ``[B, *S]``; or ``[*S]`` if ``y`` is one number. It must require grad
            before ``y`` is computed from it.
        order: k >= 1.
        squeeze: return the derivative in the shape of ``y``, ``[B]`` or ``[B, 1]``; for an x with
            one entry per sample, such as a column ``[B, 1]``. Without it u_xx of u ``[B, 1]`` is
            ``[B, 1, 1]``, and ``u_t - u_xx`` broadcasts to ``[B, B, 1]``.

    Returns:
        ``[B, *S, ..., *S]`` with ``S`` k times (without ``B`` if ``y`` is one number).

    Raises:
        ValueError: if the shapes do not fit, a tensor is complex, ``x`` does not require grad, or
            ``y`` was not computed from it but from the same leaf, as if x is a slice taken
            afterwards; if ``order`` < 1, or it would take over ten thousand backward passes.
        RuntimeError: if torch has no derivative of that order through the graph, or a wrong one.

    >>> import torch
    >>> x = torch.tensor(-2.0, requires_grad=True)
    >>> [derivative(2 * x**3, x, order=k).item() for k in (1, 2, 3, 4, 5)]
    [24.0, -24.0, 12.0, 0.0, 0.0]
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> derivative(x[:, 0] * x[:, 1] ** 2, x, order=2)
    tensor([[[0., 4.],
             [4., 2.]],
    <BLANKLINE>
            [[0., 8.],
             [8., 6.]]], grad_fn=<ViewBackward0>)
    >>> x, t = torch.ones(4, 1, requires_grad=True), torch.ones(4, 1, requires_grad=True)
    >>> u = x**3 * t
    >>> u_t, u_xx = derivative(u, t), derivative(u, x, order=2, squeeze=True)
    >>> (u_t - u_xx).shape  # 1 - 6
    torch.Size([4, 1])
    """
    checks.integer("derivative(order=...)", order, 1)
    if not x.requires_grad:
        raise ValueError(
            "`derivative(y, x)` needs an x that requires grad; "
            "call x.requires_grad_() before y is computed from it"
        )
    if x.is_complex() or y.is_complex():
        raise ValueError(
            "`derivative(y, x)` takes real tensors; got a complex one: use torch.view_as_real"
        )
    batched = y.ndim > 0 and not (y.numel() == 1 and x.ndim == 0)
    if batched and (x.ndim == 0 or y.numel() != len(x) or len(y) != len(x)):
        raise ValueError(
            f"`derivative(y, x)` needs y [B] or [B, 1] for an x [B, ...], or a single number y []; "
            f"got y {list(y.shape)} and x {list(x.shape)}"
        )
    if squeeze and x.numel() != y.numel():
        raise ValueError(
            "`derivative(squeeze=True)` needs an x with one entry per sample, such as a column "
            f"[B, 1]; got {list(x.shape)}: compute y from its columns, x1, x2 = X.split(1, 1)"
        )
    graph.require_within(y, (x,))
    graph.require_derivatives(y, (x,), order)
    sample = x.shape[1:] if batched else x.shape
    column = y.reshape(-1, 1)  # [G, 1]
    with mended(y):
        rows = [entries for (entries,) in derivative_rows(column, (x,), order, batched=batched)]
    # The columns of a row run over the last index, and the rows over the first k - 1 indices.
    full = torch.stack(rows, dim=1)  # [G, n^(k-1), n]
    shape = y.shape if squeeze else x.shape[: x.ndim - len(sample)] + sample * order
    return full.reshape(shape)


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
        grads = torch.autograd.grad(y, xs, times, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ExplainedError(error) from error
    grads = regathered(y, grads) if has_ranks() else grads
    return dense(grads, xs)


def gradients_at(y: Tensor, edges: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradients of one number at edges of its graph, differentiable, None if unused.

    Args:
        y: one number.
        edges: from `torch.autograd.graph.get_gradient_edge`, or tensors.

    Returns:
        A gradient for each edge.

    Raises:
        ExplainedError: if an operation has no derivative; the message says what to do.
    """
    with without_autocast(y):
        try:
            return torch.autograd.grad(y, edges, create_graph=True, allow_unused=True)
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
    with without_autocast(y):
        try:
            grads = torch.autograd.grad(y.sum(), xs, retain_graph=retain, allow_unused=True)
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
        with without_autocast(ys[0]):
            try:
                grads = torch.autograd.grad(ys, xs, vs, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise ExplainedError(error) from error
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]


def gradient_norm(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return the norm of the gradient in all parameters together, not differentiable."""
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
