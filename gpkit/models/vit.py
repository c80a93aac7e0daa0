"""A small vision transformer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpkit.models import options


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        """Return, for every token, a mixture of all tokens of its sample."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # [B, heads, N, D/heads]
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: int, activation: str, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
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

    torch's fused attention has no double backward, and its fused layer norm a wrong third
    derivative. A penalty that is called with the net as a function, ``penalty(net, x)``, avoids
    both by itself. For a graph of your own, ``penalty(net(x), x)``, run the forward under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, and with ``order`` >= 2 under
    ``gpkit.elementary()`` too; otherwise the penalty refuses the graph.

    The default activation is smooth: the second derivative of ReLU is zero, so with ReLU only the
    attention and the norms have curvature for a penalty of order >= 2.

    Args:
        input_shape: the shape of one sample, (C, H, W).
        num_outputs: the number of outputs; for one the result is ``[B, 1]``.
        patch_size: the side of a square patch; it must divide both sides of the image.
        dim: the size of a token; a multiple of ``heads``.
        depth: the number of blocks.
        heads: the number of attention heads.
        mlp_ratio: the hidden size of a block's perceptron, over ``dim``.
        activation: gelu, silu, softplus, tanh or relu.
        dropout: the probability that an attention weight, or a unit of a branch, is dropped.

    Raises:
        ValueError: if the input is no image, or an option is out of its range.

    >>> import gpkit
    >>> net, x = ViT((1, 8, 8), 10), torch.zeros(5, 1, 8, 8)
    >>> net(x).shape
    torch.Size([5, 10])
    >>> gpkit.jacobian()(net, x).requires_grad  # no context needed
    True
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
        self.norm = nn.LayerNorm(dim)
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
