"""Arithmetic of norms: wider dtypes, rows ``[G, n]``, lengths, roots, dual directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkit.autodiff.compat import norms_of


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype to compute norms of ``x`` in: float32 for float16 and bfloat16."""
    return torch.float32 if x.dtype in HALF else x.dtype


HALF = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of x: entering one takes microseconds."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def reduce_rows(
    rows: Iterable[tuple[Tensor, ...]],
    norm: str,
    groups: Tensor | None = None,
    count: int = 0,
) -> Tensor:
    """Return n² ``[G]`` of a derivative.

    Args:
        rows: each a tuple of tensors ``[G, n]``; or ``[N, n]`` with ``groups``.
        norm: "l2", "l1" or "linf".
        groups: the group ``[N]`` of each row, if a norm is over several of them.
        count: G, the number of groups.
    """
    total: Tensor | None = None
    for row in rows:
        for part in row:
            part = part.to(wide(part)) if part.dtype in HALF else part
            if norm == "l2":
                part = part.square().sum(1)
            elif norm == "l1":
                part = part.abs().sum(1)
            else:
                part = part.abs().amax(1)
            if groups is not None:
                how = "amax" if norm == "linf" else "sum"
                empty = part.new_zeros(count)
                part = empty.scatter_reduce(0, groups, part, how, include_self=True)
            if total is None:
                total = part
            else:
                total = torch.maximum(total, part) if norm == "linf" else total + part
    assert total is not None, "a derivative has at least one entry"
    return total if norm == "l2" else total.square()


def as_real(x: Tensor) -> Tensor:
    """Return ``x``, or the real and imaginary parts ``[*S, 2]`` of a complex ``x`` ``[*S]``.

    So every norm of a gradient in complex weights is one over their real and imaginary parts, as
    torch's optimisers see them: ‖g‖² is the sum of |g|².
    """
    return torch.view_as_real(x) if x.is_complex() else x


def shaped(row: Tensor, x: Tensor) -> Tensor:
    """Return a row or rows of real entries in the shape and dtype of ``x``, see `as_real`."""
    if x.is_complex():
        return torch.view_as_complex(row.reshape(*x.shape, 2).contiguous()).to(x.dtype)
    return row.reshape(x.shape).to(x.dtype)


def root(squared_norms: Tensor) -> Tensor:
    """Return the square root, with the derivative zero at zero instead of infinity.

    >>> n2 = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> torch.autograd.grad(root(n2).sum(), n2)
    (tensor([0.0000, 0.2500]),)
    """
    if getattr(squared_norms, POSITIVE, False) and not is_compiling():
        return squared_norms.sqrt()
    zero = squared_norms <= 0  # not "not > 0", which would hide a NaN
    return squared_norms.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def is_positive(squared_norms: Tensor) -> bool:
    """Whether all of them are known to be > 0: on a CPU, where looking is cheap.

    Args:
        squared_norms: n² ``[G]``, >= 0, or NaN, which counts as > 0.

    Returns:
        False where one of them is zero, or on another device.
    """
    return squared_norms.is_cpu and squared_norms.all().item() is True


def note_positive(squared_norms: Tensor) -> None:
    """Look whether all of n² ``[G]`` are > 0, so that `root` need not."""
    if is_positive(squared_norms):
        setattr(squared_norms, POSITIVE, True)


POSITIVE = "gpkit_positive"  # an attribute of a tensor


def squared_length(parts: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of all squares ``[1]``, in float32 or better."""
    parts = tuple(torch.view_as_real(p) if p.is_complex() else p for p in parts)
    if is_compiling():
        pass  # a graph adds the squares where it computes the gradients
    elif sum(part.numel() for part in parts) < SMALL:
        parts = (torch.cat([part.reshape(-1) for part in parts]),)
    elif all(p.dtype in WIDE for p in parts):
        return large_squared_length(parts)
    squares = [(p if p.dtype.itemsize > 2 else p.float()).square().sum() for p in parts]
    return sum(squares[1:], squares[0]).reshape(1)


SMALL = 2**18  # entries; below this, one copy is cheaper than a sum for each parameter


class _SquaredLength(torch.autograd.Function):
    """Σ p². It reads each tensor once and makes none of its size; autograd's own makes two."""

    @staticmethod
    def forward(ctx, *parts):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*parts)
        return torch.stack(norms_of(parts)).square().sum().reshape(1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        twice = 2 * grad.reshape(())
        return tuple([part * twice for part in ctx.saved_tensors])


def large_squared_length(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of all squares ``[1]`` of tensors in float32 or float64.

    >>> p = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> n2 = large_squared_length([p])
    >>> n2.item(), torch.autograd.grad(n2, p)[0].tolist()
    (25.0, [6.0, 8.0])
    """
    n2: Tensor = _SquaredLength.apply(*parts)
    return n2


Rows = list[Tensor]  # one [G, n] for each variable


def zeros_for_none(grads: Any, xs: Any) -> list[Tensor]:
    """Return gradients, with zeros in the shape of x where a gradient is None."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]


def pairwise_sums(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of each pair of tensors from two sequences of the same length."""
    return [a + b for a, b in zip(first, second, strict=True)]


# (tensors, entry, reduce) -> the sum or maximum of entry(x) >= 0 over all entries of all tensors.
Over = Callable[[Sequence[Tensor], Callable[[Tensor], Tensor], str], Tensor]


def over_all(
    tensors: Sequence[Tensor], entry: Callable[[Tensor], Tensor], reduce: str = "sum"
) -> Tensor:
    """Return the sum or maximum of ``entry(x)`` >= 0 over all entries: a scalar."""
    together = torch.sum if reduce == "sum" else torch.amax
    parts = [together(entry(as_real(widened(t))).reshape(-1), 0) for t in tensors]  # one by one
    return together(torch.stack(parts), 0)


def over_rows(
    rows: Sequence[Tensor], entry: Callable[[Tensor], Tensor], reduce: str = "sum"
) -> Tensor:
    """Return the sum or maximum of ``entry(x)`` >= 0 over each row of ``[G, n]``: ``[G, 1]``."""
    parts = [entry(widened(row)) for row in rows]
    if reduce == "sum":
        return torch.stack([part.sum(1, keepdim=True) for part in parts]).sum(0)
    return torch.stack([part.amax(1, keepdim=True) for part in parts]).amax(0)


def dual(grads: Sequence[Tensor], norm: str, over: Over = over_all) -> tuple[Tensor, list[Tensor]]:
    """Return the norm n of a gradient g, and the direction v of steepest ascent, ⟨g, v⟩ = n.

    v is g/‖g‖ for "l2", sign(g) for "l1", and the sign of the largest entry for "linf", divided
    equally among tied entries, like the gradient of a maximum. If g is zero, v is zero.

    Args:
        grads: g, one tensor for each variable.
        norm: "l2", "l1" or "linf".
        over: `over_all`, `over_rows`, or a reduction over the shards of several processes.

    Returns:
        n in the shape that ``over`` returns, and v in the shapes of g, in float32 or better.

    >>> n, (v,) = dual([torch.tensor([3.0, -4.0, 4.0])], "linf")
    >>> n.item(), v.tolist()
    (4.0, [0.0, -0.5, 0.5])
    """
    given = [widened(g) for g in grads]
    if norm == "l2":
        n = over(given, torch.square, "sum").sqrt()
        return n, [g * torch.where(n == 0, n, 1 / n) for g in given]
    parts = [as_real(g) for g in given]
    if norm == "l1":
        n = over(given, torch.abs, "sum")
        return n, [shaped(p.sign(), g) for p, g in zip(parts, given, strict=True)]
    n = over(given, torch.abs, "max")
    largest = [p.sign() * (p.abs() == n) for p in parts]
    count = over(largest, torch.abs, "sum")
    return n, [shaped(v / count.clamp(min=1), g) for v, g in zip(largest, given, strict=True)]


def steepest(rows: Rows, norm: str) -> Rows:
    """Return v with ⟨g, v⟩ = ‖g‖ for each row of gradients g ``[G, n]``; zeros if g is zero."""
    return dual(rows, norm, over_rows)[1]


def length_of(rows: Rows) -> Tensor:
    """Return the Euclidean length ``[G]`` of rows ``[G, n]``."""
    return reduce_rows([tuple(rows)], "l2").sqrt()


def nonzero_mask(x: Tensor) -> Tensor:
    """Return 1 where ``x`` is not zero (NaN included), and 0 elsewhere, in the dtype of ``x``."""
    return (x != 0).to(x)


def spacing(y: Tensor, *xs: Tensor) -> float:
    """Return the machine epsilon of the coarsest dtype among the tensors and autocast."""
    dtypes = [t.dtype for t in (y, *xs)]
    if torch.is_autocast_enabled(y.device.type):
        dtypes.append(torch.get_autocast_dtype(y.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def normalized(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return rows ``[G, n]`` divided by the length over all parts of a row; zero stays zero."""
    parts = [widened(r) for r in rows]
    scale = torch.stack([p.abs().amax(1) for p in parts]).amax(0).unsqueeze(1)  # against underflow
    parts = [p / torch.where(scale > 0, scale, torch.ones_like(scale)) for p in parts]
    length = torch.stack([p.square().sum(1) for p in parts]).sum(0).sqrt().unsqueeze(1)
    return [p / torch.where(length > 0, length, torch.ones_like(length)) for p in parts]


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or better."""
    return x if x.dtype in WIDE else x.to(torch.promote_types(x.dtype, torch.float32))


def per_pixel(row: Tensor, x: Tensor) -> Tensor:
    """Return a derivative ``[B, C·P]`` in ``x`` ``[B, C, *S]`` as ``[B·P, C]``, for P pixels.

    >>> import torch
    >>> x = torch.zeros(1, 3, 2)  # three channels, two pixels
    >>> per_pixel(torch.arange(6).reshape(1, 6), x)
    tensor([[0, 2, 4],
            [1, 3, 5]])
    """
    return row.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def dense(grads: Sequence[Tensor | None], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return gradients, with zeros in the shape of x where a gradient is None.

    Raises:
        RuntimeError: if one is sparse.
    """
    found = []
    for g, x in zip(grads, xs, strict=True):
        if g is None:
            g = torch.zeros_like(x)
        elif g.is_sparse:
            raise RuntimeError(
                "a parameter has a sparse gradient, which cannot be differentiated again: use "
                'nn.Embedding(sparse=False), or estimator="finite_difference"'
            )
        found.append(g)
    return tuple(found)
