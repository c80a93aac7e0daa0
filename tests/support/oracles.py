"""What the penalties must be: torch.func references and closed forms, without gpkit."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

ORDS = {"l2": 2, "l1": 1, "linf": torch.inf}
Params = dict[str, Tensor]

with warnings.catch_warnings():  # torch's own forward mode loads its deprecated TorchScript
    warnings.simplefilter("ignore", DeprecationWarning)
    jacfwd(torch.sin)(torch.zeros(1))


def derivative(f: Callable[..., Tensor], order: int, z: Tensor, *others: Tensor) -> Tensor:
    """Return all k-th partials in z of each sample's f(z, ...), ``[B, *O, *S, ..., *S]``."""
    for k in range(order):
        f = jacrev(f) if k % 2 == 0 else jacfwd(f)
    return vmap(f)(z, *others)


def input_norms(
    f: Callable[..., Tensor], order: int, z: Tensor, *others: Tensor, norm: str = "l2"
) -> Tensor:
    """Return the norm of each sample's k-th derivative in z, ``[B]``."""
    entries = derivative(f, order, z, *others).flatten(1)
    return torch.linalg.vector_norm(entries, ORDS[norm], dim=1)


def spectral_norms(f: Callable[..., Tensor], z: Tensor, *others: Tensor) -> Tensor:
    """Return the largest singular value of each sample's Jacobian in z, ``[B]``."""
    J = derivative(f, 1, z, *others)
    return torch.linalg.svdvals(J.reshape(len(z), -1, z[0].numel()))[:, 0]


def weight_norm(loss: Callable[[Params], Tensor], params: Params, order: int = 1) -> Tensor:
    """Return the norm of the k-th derivative in all parameters together, ``[1]``."""
    flat = torch.cat([p.flatten() for p in params.values()])

    def of_vector(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in params.values()])
        shaped = zip(params.items(), pieces, strict=True)
        return loss({name: piece.reshape(p.shape) for (name, p), piece in shaped})

    for _ in range(order):
        of_vector = jacrev(of_vector)
    return of_vector(flat).square().sum().sqrt().reshape(1)


def gradient_change(f: Callable[..., Tensor], h: float, z: Tensor, *others: Tensor) -> Tensor:
    """Return the norm of ∇f(z + hs) - ∇f(z), s the unit vector of the signs of ∇f(z), ``[B]``."""
    gradient = vmap(jacrev(f))
    here = gradient(z, *others)
    signs = here.flatten(1).sign()
    units = signs / signs.abs().sum(1, keepdim=True).clamp(min=1).sqrt()
    there = gradient(z + h * units.reshape(z.shape), *others)
    return torch.linalg.vector_norm((there - here).flatten(1), dim=1)


def weight_norm_by_difference(loss: Callable[[Params], Tensor], params: Params, r: float) -> Tensor:
    """Return ‖∇L‖ ``[1]``, whose own gradient is (∇L(θ + r∇L/‖∇L‖) - ∇L(θ)) / r."""
    grads = jacrev(loss)({name: p.detach() for name, p in params.items()})
    grads = {name: g.detach() for name, g in grads.items()}
    norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
    moved = {name: p + r * grads[name] / norm for name, p in params.items()} if norm else params
    slope = (loss(moved) - loss(params)) / r
    return (norm + slope - slope.detach()).reshape(1)


def tanh_ridge(W: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u·tanh(Wx), its gradient and its Hessian in x: ``[B], [B, n], [B, n, n]``."""
    t = torch.tanh(x @ W.T)  # [B, h]
    slope = u * (1 - t**2)
    bend = -2 * u * t * (1 - t**2)
    return t @ u, slope @ W, torch.einsum("bh,hi,hj->bij", bend, W, W)


def regression(X: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖∇L‖² and its gradient 2H∇L, for L = ‖Xw - t‖² / 2n and H = XᵀX / n."""
    H, gradient = X.T @ X / len(X), X.T @ (X @ w - t) / len(X)
    return gradient @ gradient, 2 * H @ gradient


def projection_std(M: Tensor, distribution: str) -> float:
    """Return the standard deviation of vᵀMv over its mean tr M, for symmetric M ``[m, m]``."""
    m, square, trace = len(M), M.square().sum(), M.trace()
    if distribution == "rademacher":
        variance = 2 * (square - M.diagonal().square().sum())
    elif distribution == "gaussian":
        variance = 2 * square
    else:  # uniform on the sphere of radius √m
        variance = m / (m + 2) * (trace**2 + 2 * square) - trace**2
    return (variance.sqrt() / trace).item()


def coupled_derivative(f: Callable[[Tensor], Tensor], order: int, z: Tensor) -> Tensor:
    """Return k times over the gradient in z of the batch's sum, ``[B, *O, *S, ..., *S]``.

    It is that of each sample where samples do not see one another; batch statistics couple them.
    """
    if order == 0:
        return f(z)

    def summed(z: Tensor) -> Tensor:
        return coupled_derivative(f, order - 1, z).sum(0)

    return jacrev(summed)(z).movedim(-z.ndim, 0)


def standardised(x: Tensor, dims: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    """Return (x - mean) / √(variance + ε) over ``dims``."""
    mean = x.sum(dims, keepdim=True) / math.prod(x.shape[d] for d in dims)
    var = torch.var(x, dims, correction=0, keepdim=True)
    return (x - mean) / (var + eps) ** 0.5


def along(f: Callable[[Tensor], Tensor], order: int, x: Tensor, v: Tensor) -> Tensor:
    """Return d^k/dt^k f(x + t v) at t = 0, by nested forward mode: of the shape of f(x)."""

    def path(t: Tensor) -> Tensor:
        return f(x + t * v)

    for _ in range(order):
        path = jacfwd(path)
    return path(x.new_zeros(()))
