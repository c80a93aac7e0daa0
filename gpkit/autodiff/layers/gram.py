"""Norms of gradients in the weights from layer inputs and output gradients, without the gradients.

A linear layer z = W a has the gradient Σ_t δ_t ⊗ a_t, with δ = ∂L/∂z and t over the positions that
share W. Its squared norm is Σ_{s,t} (δ_s·δ_t)(a_s·a_t), so the gradient itself need not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkit.autodiff.compat import times
from gpkit.autodiff.numerics import widened


@dataclass(slots=True, eq=False)
class Outer:
    """A gradient of a matrix in each group, ``Σ_t left_t ⊗ right_t``.

    Args:
        left: ``[G, T, p]``; or integers ``[G, T]``, which stand for rows of the identity.
        right: ``[G, T, q]``.
        rows: p.
    """

    left: Tensor
    right: Tensor
    rows: int

    @property
    def sparse(self) -> bool:
        """Whether the left factors are rows of the identity."""
        return not self.left.is_floating_point()

    @property
    def cheaper(self) -> bool:
        """Whether the norm costs less than the gradient."""
        groups, positions, width = self.right.shape
        return self.sparse or gram_is_cheaper(groups, positions, self.rows, width)

    def dense(self) -> Tensor:
        """Return the gradients, ``[G, p·q]``."""
        if not self.sparse:
            return (self.left.transpose(1, 2) @ self.right).flatten(1)
        groups, width = len(self.left), self.right.shape[-1]
        out = self.right.new_zeros(groups, self.rows, width)
        index = self.left.unsqueeze(-1).expand_as(self.right)
        return out.scatter_add(1, index, self.right).flatten(1)


@dataclass(slots=True, eq=False)
class Direct:
    """A gradient in each group, ``[G, n]``."""

    grad: Tensor

    def dense(self) -> Tensor:
        """Return the gradients, ``[G, n]``."""
        return self.grad


@dataclass(slots=True, eq=False)
class Product:
    """A gradient of a matrix in each group, ``left ⊗ right``: an `Outer` of one position.

    Args:
        left: ``[G, p]``.
        right: ``[G, q]``.
    """

    left: Tensor
    right: Tensor

    def outer(self) -> Outer:
        """Return it with a dimension of positions."""
        return Outer(self.left.unsqueeze(1), self.right.unsqueeze(1), self.left.shape[1])


Part = Outer | Direct | Product


Rows = tuple[Tensor, Tensor | None]  # l and r, whose outer products are gradients; or gradients


def rows_of(parts: Sequence[Part]) -> Rows | None:
    """Return the rows that the norm of a parameter's gradient is one of; None if Gram matrices pay.

    Args:
        parts: from every call of the layers that share the parameter; their sum is the gradient.
    """
    if len(parts) == 1:
        first = parts[0]
        if isinstance(first, Product):
            return first.left, first.right
        if isinstance(first, Direct):
            return first.grad, None
    others = [part.outer() if isinstance(part, Product) else part for part in parts]
    if all(isinstance(part, Outer) and part.cheaper for part in others):
        return None
    grads = [part.dense() for part in others]
    return torch.stack(grads).sum(0) if len(grads) > 1 else grads[0], None


def rows_norm(rows: Sequence[Rows]) -> Tensor:
    """Return Σ_k ‖l_k‖²·‖r_k‖² ``[G]`` of pairs of rows l_k ``[G, p]`` and r_k ``[G, q]``.

    Args:
        rows: the pairs; where r is None, it counts as a row of norm one.
    """
    if is_compiling():  # the compiler joins these operations itself
        each = [_squares(left) * (1 if r is None else _squares(r)) for left, r in rows]
        return sum(each[1:], each[0])
    found = {id(t): t for pair in rows for t in pair if t is not None}
    at = {own: i for i, own in enumerate(found)}
    places = [(at[id(left)], None if r is None else at[id(r)]) for left, r in rows]
    total: Tensor = _RowsNorm.apply(places, *found.values())
    return total


class _RowsNorm(torch.autograd.Function):
    """Its backward takes one product for each tensor; autograd's own takes three, and sums."""

    @staticmethod
    def forward(ctx, places, *rows):  # type: ignore[no-untyped-def]
        squares = [lengths(t, dim=1).square() for t in map(widened, rows)]
        ctx.save_for_backward(*rows, *squares)
        ctx.places = places
        each = [squares[i] if j is None else squares[i] * squares[j] for i, j in places]
        return sum(each[1:], each[0])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        half = len(ctx.saved_tensors) // 2
        rows, squares = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        if torch.is_grad_enabled():  # a third derivative: the saved squares have no graph
            squares = [_squares(t) for t in rows]
        double, needed = 2 * grad, ctx.needs_input_grad[1:]
        factors: dict[int, Tensor] = {}
        for i, j in ctx.places:
            for own, other in ((i, j),) if j is None else ((i, j), (j, i)):
                if needed[own]:
                    factor = double if other is None else double * squares[other]
                    factors[own] = factors[own] + factor if own in factors else factor
        columns = [f.unsqueeze(1) for f in factors.values()]
        found = dict(zip(factors, times([rows[i] for i in factors], columns), strict=True))
        return None, *map(found.get, range(half))


lengths: Any = torch.linalg.vector_norm  # in one pass, where a sum of squares takes two


def _squares(rows: Tensor) -> Tensor:
    return widened(rows).square().sum(1)


def gram_norm(parts: Sequence[Part]) -> Tensor:
    """Return the squared norm ``[G]`` of the sum of several parts by Gram matrices.

    Args:
        parts: from every call of the layers that share the parameter; none is a `Direct`.

    Returns:
        n² ``[G]``, differentiable.
    """
    products = [part for part in parts if not isinstance(part, Direct)]
    outers = [part.outer() if isinstance(part, Product) else part for part in products]
    matrices = [part for part in outers if not part.sparse]
    tokens = [part for part in outers if part.sparse]
    joined = [_joined(group) for group in (matrices, tokens) if group]
    total = _square(joined[0])
    for other in joined[1:]:
        total = total + _square(other) + 2 * _product(joined[0], other)
    return total


def gram_is_cheaper(groups: int, positions: int, p: int, q: int) -> bool:
    """Whether the Gram matrices of T positions cost less than the gradient ``[p, q]``.

    Args:
        groups: G. With several, T² numbers are compared with p·q, for time and memory. With one,
            where T is the whole batch, the products of the forward and backward pass are.
        positions: T.
        p: the number of rows of the gradient.
        q: the number of its columns.

    Returns:
        Whether it is so.
    """
    if groups > 1:
        return 2 * positions**2 <= p * q
    return 2 * positions * (p + q) < 3 * p * q


def may_pay(p: int, q: int) -> bool:
    """Whether Gram matrices may pay for ``[p, q]``: a harmonic mean of p and q over 64."""
    return p * q > 32 * (p + q)


def _joined(parts: list[Outer]) -> Outer:
    if len(parts) == 1:
        return parts[0]
    left, right = (torch.cat(ts, 1) for ts in zip(*((p.left, p.right) for p in parts), strict=True))
    return Outer(left, right, parts[0].rows)


def _square(part: Outer) -> Tensor:
    if part.right.shape[1] == 1:
        right = _squares(part.right.flatten(1))
        return right if part.sparse else right * _squares(part.left.flatten(1))
    return _product(part, part)


def _product(one: Outer, other: Outer) -> Tensor:
    """Return the inner product ``[G]`` of two gradients."""
    if one is other and not one.sparse:
        return gram_product(one.left, one.right)
    return (_left_products(one, other) * (one.right @ other.right.transpose(1, 2))).sum((1, 2))


def _left_products(one: Outer, other: Outer) -> Tensor:
    if one.sparse and other.sparse:
        return one.left.unsqueeze(2) == other.left.unsqueeze(1)
    if other.sparse:  # row s of the left factors at the entry that the other's row t selects
        index = other.left.unsqueeze(1).expand(-1, one.left.shape[1], -1)
        return one.left.gather(2, index)
    return _left_products(other, one).transpose(1, 2)


class _GramProduct(torch.autograd.Function):
    """Σ_{s,t} (l_s·l_t)(r_s·r_t). Its backward takes two products; autograd's own takes four."""

    @staticmethod
    def forward(ctx, left, right):  # type: ignore[no-untyped-def]
        of_left, of_right = left @ left.mT, right @ right.mT
        ctx.save_for_backward(left, right, of_left, of_right)
        return (of_left * of_right).sum((-2, -1))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        left, right, of_left, of_right = ctx.saved_tensors
        if torch.is_grad_enabled():  # a third derivative: the saved products have no graph
            of_left, of_right = left @ left.mT, right @ right.mT
        factor = 2 * grad[..., None, None]
        return (factor * of_right) @ left, (factor * of_left) @ right


def gram_product(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_{s,t} (l_s·l_t)(r_s·r_t) ``[G]``, the squared norm of Σ_t l_t ⊗ r_t.

    Args:
        left: l, ``[G, T, p]``; or ``[T, p]``, for one number.
        right: r, ``[G, T, q]`` or ``[T, q]``.

    >>> l, r = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[3.0], [1.0]]])
    >>> gram_product(l, r)  # ‖(1, 2)·3 + (0, 1)·1‖² = 3² + 7²
    tensor([58.])
    """
    total: Tensor = _GramProduct.apply(widened(left), widened(right))
    return total
