"""Turn: renumber the entries of each sample, and change signs."""

from __future__ import annotations

import torch
from torch import Tensor


class Turn:
    """A signed permutation Q of the entries of a sample, which keeps every l_p norm.

    Args:
        shape: the shape of a sample, ``[*S]``; tensors ``[..., *S]`` are turned, others are not.
        device: the device.
        seed: what Q is drawn from.
    """

    def __init__(self, shape: torch.Size, device: torch.device, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        n = shape.numel()
        self.shape = shape
        self.order = torch.randperm(n, generator=rng).to(device)
        self.signs = (1 - 2 * (torch.arange(n) % 2))[torch.randperm(n, generator=rng)].to(device)
        if n == 1:
            self.signs = -torch.ones(1, dtype=torch.int64, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return Q x, of a sample; of a mask, which has no sign, only the new order."""
        turned = self._turned(x, self.order, self.signs)
        return turned.detach().requires_grad_(x.requires_grad)

    def back(self, x: Tensor) -> Tensor:
        """Return Qᵀ x."""
        back = self.order.argsort()
        return self._turned(x, back, self.signs[back])

    def _turned(self, x: Tensor, order: Tensor, signs: Tensor) -> Tensor:
        dims = len(self.shape)
        if dims == 0 or x.ndim < dims or x.shape[x.ndim - dims :] != self.shape:
            return x
        if not (x.is_floating_point() or x.dtype == torch.bool):
            return x
        flat = x.flatten(x.ndim - dims)[..., order]
        flat = flat if x.dtype == torch.bool else flat * signs.to(x.dtype)
        return flat.reshape(x.shape)
