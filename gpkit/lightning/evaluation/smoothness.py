"""How steep a net is at inputs: the Jacobian, and local Lipschitz estimates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Net = Callable[[Tensor], Tensor]


def squared_jacobian(net: Net, x: Tensor) -> Tensor:
    r"""Return ‖∂f/∂x‖_F² of each sample, exactly, with one backward pass for each output.

    Args:
        net: inputs ``[B, *S]`` -> outputs ``[B, *O]``; a sample's output depends on it alone.
        x: the inputs.

    Returns:
        The squared norms ``[B]``, without a graph.

    >>> squared_jacobian(lambda x: x @ torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(1, 2))
    tensor([30.])
    """
    x = x.detach().requires_grad_()
    outputs = net(x).flatten(1).sum(0)
    last = len(outputs) - 1
    grads = (torch.autograd.grad(y, x, retain_graph=i < last)[0] for i, y in enumerate(outputs))
    return torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)


def local_lipschitz(
    net: Net, x: Tensor, radius: float, *, steps: int, rng: torch.Generator
) -> Tensor:
    r"""Return a lower bound of the Lipschitz constant of each sample's neighbourhood.

    .. math:: \max_{\|\delta\| = r} \frac{\|f(x + \delta) - f(x)\|}{r}, \quad
              \delta_{k+1} = r \, \frac{g_k}{\|g_k\|}, \;
              g_k = J(x + \delta_k)^\top \big(f(x + \delta_k) - f(x)\big)

    The largest ratio that ``steps`` steps of this iteration meet, from a random start. Of a linear
    map it is power iteration, which converges to the largest singular value.

    Args:
        net: inputs ``[B, *S]`` -> outputs ``[B, *O]``; a sample's output depends on it alone.
        x: the inputs.
        radius: r, in the l2 norm.
        steps: the number of steps.
        rng: draws the starts, on the CPU.

    Returns:
        The bounds ``[B]``, without a graph.
    """
    with torch.no_grad():
        at_x = net(x).flatten(1)
    direction = _unit(torch.randn(x.shape, generator=rng).to(x))
    best = x.new_zeros(len(x))
    for step in range(steps + 1):
        moved = (x + radius * direction).detach().requires_grad_()
        n2 = (net(moved).flatten(1) - at_x).square().sum(1)
        best = torch.maximum(best, n2.detach().sqrt() / radius)
        if step < steps:
            direction = _unit(torch.autograd.grad(n2.sum(), moved)[0])
    return best


def _unit(x: Tensor) -> Tensor:
    norms = x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    return x / norms.clamp_min(torch.finfo(x.dtype).tiny)
