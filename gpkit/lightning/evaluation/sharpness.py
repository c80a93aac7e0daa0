"""The curvature of the loss in the weights: the largest Hessian eigenvalue, and the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Product:
    """Return the function v -> ∇²L v of vectors ``[n]``, by double backward.

    Args:
        loss: a scalar with a graph.
        parameters: of the loss; n is the number of their entries.
    """
    grads = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in grads])

    def product(v: Tensor) -> Tensor:
        if not flat.requires_grad:  # a loss that is linear in the parameters
            return torch.zeros_like(v)
        found = torch.autograd.grad(flat, parameters, v, retain_graph=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found]).detach()

    return product


def top_eigenvalue(
    product: Product, size: int, *, steps: int, rng: torch.Generator, like: Tensor
) -> float:
    r"""Return the largest eigenvalue of a symmetric matrix A, by the Lanczos method.

    After m steps it is that of the tridiagonal matrix :math:`T = Q^\top A Q`, where Q is an
    orthonormal basis of :math:`q, A q, \dots, A^{m-1} q`: a lower bound, and exact for m = n. Each
    vector is orthogonalised against all before it.

    Args:
        product: v -> A v.
        size: n.
        steps: m.
        rng: draws q, on the CPU.
        like: the dtype and device of the vectors.

    Returns:
        The eigenvalue.
    """
    q = torch.randn(size, generator=rng, dtype=torch.float64).to(like)
    basis = [q / q.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, size)):
        w = product(basis[-1])
        diagonal.append(float(w @ basis[-1]))
        q_so_far = torch.stack(basis)
        for _ in range(2):  # once more, against rounding
            w = w - q_so_far.T @ (q_so_far @ w)
        length = float(w.norm())
        if length <= 1e-6 * max(map(abs, diagonal)) or len(diagonal) == size:
            break
        beside.append(length)
        basis.append(w / length)
    beside = beside[: len(diagonal) - 1]
    parts = (torch.tensor(each, dtype=torch.float64) for each in (diagonal, beside))
    middle, side = parts
    tridiagonal = middle.diag() + side.diag(1) + side.diag(-1)
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])


def trace(
    product: Product, size: int, *, samples: int, rng: torch.Generator, like: Tensor
) -> float:
    r"""Return an estimate of tr A, :math:`\text{mean}_k \, v_k^\top A v_k`, v of random signs.

    It is unbiased, and exact for a diagonal matrix (Hutchinson 1989). Its variance is
    :math:`2 \sum_{i \ne j} A_{ij}^2 / K`.

    Args:
        product: v -> A v.
        size: n.
        samples: K, the number of vectors.
        rng: draws them, on the CPU.
        like: the dtype and device of the vectors.
    """
    total = 0.0
    for _ in range(samples):
        v = (torch.randint(2, (size,), generator=rng) * 2 - 1).to(like)
        total += float(v @ product(v))
    return total / samples
