"""A small vision transformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpkit.models import options


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, written in elementary operations.

    The same function as `torch.nn.LayerNorm`, whose fused kernel has a wrong third derivative; this
    one is right at every order.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        """Start at scale one and shift zero."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        """Return the normalised tokens."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        """Build the projections."""
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        """Let every token look at all tokens of its sample."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # [B, heads, N, D/heads]
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a perceptron, each added to the residual."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: int, activation: str, dropout: float
    ) -> None:
        """Build both branches."""
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim),
            options.activation("ViT", activation),
            nn.Linear(mlp_ratio * dim, dim),
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        """Return the tokens after both branches."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A vision transformer: patches, a learned position embedding, blocks, the mean over tokens.

    Its derivatives are right at every order, on one condition that lies with the caller: torch's
    fused attention kernels have no double backward, so a penalty needs a forward pass under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. The default activation is smooth on purpose:
    the second derivative of ReLU is zero, so a penalty of order >= 2 vanishes on a ReLU net, but
    for the curvature of the attention and the norms.

    Args:
        input_shape: The shape of one sample, (C, H, W).
        num_outputs: The number of outputs; with 1 they stay [B, 1].
        patch_size: The side of a square patch; it must divide both image sides.
        dim: The width of a token; a multiple of `heads`.
        depth: The number of blocks.
        heads: The attention heads.
        mlp_ratio: The hidden width of a block's perceptron, in units of `dim`.
        activation: gelu, silu, softplus, tanh or relu.
        dropout: The probability of dropping an attention weight or a unit of a branch.

    Raises:
        ValueError: If the input is no image or an option is out of range.

    Examples:
        >>> ViT((1, 8, 8), 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        *,
        patch_size: int = 2,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: int = 2,
        activation: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        """Build the layers."""
        super().__init__()
        options.positive("ViT", num_outputs=num_outputs, patch_size=patch_size, dim=dim)
        options.positive("ViT", depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        options.dropout("ViT", dropout)
        if dim % heads:
            raise ValueError(
                f"`ViT(dim={dim}, heads={heads})` must have a dim that is a multiple of heads; "
                f"use heads={math.gcd(dim, heads)}"
            )
        channels, height, width = options.image_shape("ViT", input_shape)
        _check_patch(patch_size, height, width)
        tokens = (height // patch_size) * (width // patch_size)
        self.patch_size = patch_size
        self.embed = nn.Linear(channels * patch_size**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.blocks = nn.Sequential(
            *(Block(dim, heads, mlp_ratio, activation, dropout) for _ in range(depth))
        )
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, num_outputs]
        """Return the outputs (logits, values or scores)."""
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).mT  # [B, N, C * P * P]
        tokens = self.blocks(self.embed(patches) + self.position)  # [B, N, D]
        return self.head(self.norm(tokens).mean(1))


def _check_patch(patch_size: int, height: int, width: int) -> None:
    if height % patch_size == 0 and width % patch_size == 0:
        return
    common = math.gcd(height, width)
    *first, last = [str(size) for size in range(1, common + 1) if common % size == 0]
    side = f"side {height}" if height == width else f"sides {height} and {width}"
    choices = f"{', '.join(first)} or {last}" if first else last
    raise ValueError(f"`ViT(patch_size={patch_size})` must divide the image {side}; use {choices}")
