"""`derivative`: the exact derivative of a tensor, of any order."""

from __future__ import annotations

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import derivative_rows, mended
from gpkit.findings.derivatives import require_derivatives


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
    require_derivatives(y, (x,), order)
    sample = x.shape[1:] if batched else x.shape
    column = y.reshape(-1, 1)  # [G, 1]
    with mended(y):
        rows = [entries for (entries,) in derivative_rows(column, (x,), order, batched=batched)]
    # The columns of a row run over the last index, and the rows over the first k - 1 indices.
    full = torch.stack(rows, dim=1)  # [G, n^(k-1), n]
    shape = y.shape if squeeze else x.shape[: x.ndim - len(sample)] + sample * order
    return full.reshape(shape)
