"""A small convolutional net without batch norm."""

from __future__ import annotations

import math

from torch import Tensor, nn

from gpkit import checks
from gpkit.models import options


class ConvNet(nn.Module):
    """A convolutional net of ``depth`` blocks: (3x3 convolution, group norm, activation) each.

    Each block after the first halves the sides of the image and doubles the channels. Group norm,
    unlike batch norm, keeps the samples independent, as per-sample penalties need them. The default
    activation is smooth: the second derivative of ReLU is zero, so a penalty of order >= 2 is
    almost zero on a ReLU net, where only the norms have curvature.

    Args:
        input_shape: the shape of one sample, (C, H, W).
        num_outputs: the number of outputs; for one the result is ``[B, 1]``.
        width: the number of channels of the first block; a multiple of ``groups``.
        depth: the number of blocks.
        groups: the number of groups of every group norm; 0 for no norms.
        pool: "mean" averages over the last image (of any size), "flatten" keeps every pixel.
        activation: gelu, silu, softplus, tanh or relu.

    Raises:
        ValueError: if the input is no image, or an option is out of its range.

    >>> import torch
    >>> ConvNet((1, 8, 8), 10)(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        *,
        width: int = 32,
        depth: int = 3,
        groups: int = 8,
        pool: str = "mean",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        options.positive("ConvNet", num_outputs=num_outputs, width=width, depth=depth)
        options.groups("ConvNet", width, groups)
        checks.choice("ConvNet(pool=...)", pool, ("mean", "flatten"))
        channels, *sides = options.image_shape("ConvNet", input_shape)
        layers: list[nn.Module] = []
        for i in range(depth):
            fan_in, fan_out = (width << i - 1, width << i) if i else (channels, width)
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2 if i else 1, padding=1)]
            layers += [nn.GroupNorm(groups, fan_out)] if groups else []
            layers += [options.activation("ConvNet", activation)]
        self.features = nn.Sequential(*layers)
        pixels = math.prod(-(-side // 2 ** (depth - 1)) for side in sides)  # halved, rounded up
        self.pool = nn.AdaptiveAvgPool2d(1) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(fan_out * (1 if pool == "mean" else pixels), num_outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, num_outputs]
        """Return the outputs (logits, values or scores)."""
        return self.head(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, head.in_features]
        """Return the features: the input of the last linear layer."""
        return self.pool(self.features(x)).flatten(1)
