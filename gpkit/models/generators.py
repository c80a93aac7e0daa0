"""Generators of points and of images, with or without labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.models import options
from gpkit.models.labels import Labels
from gpkit.models.mlp import MLP

OUTPUTS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "linear": nn.Identity,
}


class Generator(nn.Module):
    """A net whose input is the latents, and a learned vector of the label if there are labels.

    Args:
        latent_dim: D, the size of the latents.
        num_classes: the number of labels; 0 for none.

    Attributes:
        size: the size of the net's input: 2 D with labels, D without.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(self, latent_dim: int, num_classes: int) -> None:
        super().__init__()
        owner = type(self).__name__
        self.latent_dim = checks.integer(f"{owner}(latent_dim=...)", latent_dim, 1)
        self.labels = Labels(owner, "generator(z)", num_classes=num_classes, size=latent_dim)
        self.size = 2 * latent_dim if num_classes else latent_dim

    def given(self, z: Tensor, y: Tensor | None) -> Tensor:  # [B, D], [B] -> [B, size]
        """Return the input of the net: the latents, and the vectors of the labels.

        Raises:
            ValueError: if the latents have another shape.
        """
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"`{type(self).__name__}(latent_dim={self.latent_dim})` takes latents "
                f"[B, {self.latent_dim}]; got {list(z.shape)}: use one latent_dim for both"
            )
        vectors = self.labels(y)
        return z if vectors is None else torch.cat([z, vectors], dim=1)


class PointGenerator(Generator):
    """A generator of points: an `MLP` of the latents.

    Args:
        latent_dim: D, the size of the latents.
        output_shape: the shape of one sample.
        width: the number of units of each hidden layer.
        depth: the number of hidden layers.
        activation: relu, gelu, silu, softplus or tanh.
        num_classes: the number of labels: 0 for ``generator(z)``, K for ``generator(z, y)``.

    Raises:
        ValueError: if an option is out of its range.

    >>> PointGenerator(4, (2,))(torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    >>> PointGenerator(4, (2,), num_classes=8)(torch.zeros(5, 4), torch.arange(5)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 3,
        activation: str = "relu",
        num_classes: int = 0,
    ) -> None:
        super().__init__(latent_dim, num_classes)
        outputs = math.prod(output_shape)
        self.net = MLP((self.size,), outputs, width=width, depth=depth, activation=activation)
        self.output_shape = tuple(output_shape)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:  # [B, D] -> [B, *output_shape]
        """Return the samples."""
        return self.net(self.given(z, y)).unflatten(1, self.output_shape)


class ImageGenerator(Generator):
    """A generator of images of any size: a linear layer, then blocks that double the sides.

    It is `ImageCritic` in reverse: it begins with the sides and the channels that the critic ends
    with. A block is (nearest-neighbour upsampling, 3x3 convolution, group norm, activation) and
    halves the channels; a last convolution makes the image.

    Args:
        latent_dim: D, the size of the latents.
        output_shape: the shape of one sample, (C, H, W).
        width: the number of channels at full size; a multiple of ``groups``.
        groups: the number of groups of every group norm; 0 for no norms.
        activation: gelu, silu, softplus, tanh or relu.
        output: "sigmoid" for pixels in [0, 1], as `Digits` has them; "tanh" for [-1, 1], as
            `HuggingFace` normalises them; "linear" for any values.
        num_classes: the number of labels: 0 for ``generator(z)``, K for ``generator(z, y)``.

    Raises:
        ValueError: if the output is no image, or an option is out of its range.

    >>> ImageGenerator(16, (1, 8, 8))(torch.zeros(5, 16)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        output_shape: tuple[int, ...],
        *,
        width: int = 32,
        groups: int = 8,
        activation: str = "gelu",
        output: str = "sigmoid",
        num_classes: int = 0,
    ) -> None:
        super().__init__(latent_dim, num_classes)
        owner = "ImageGenerator"
        options.positive(owner, width=width)
        options.groups(owner, width, groups)
        checks.choice(f"{owner}(output=...)", output, OUTPUTS)
        channels, *sides = options.image_shape(
            owner, output_shape, "output_shape", "PointGenerator"
        )
        doublings = options.halvings(*sides)
        first = (width << doublings, *(side >> doublings for side in sides))

        def block(fan_out: int) -> list[nn.Module]:
            norm = [nn.GroupNorm(groups, fan_out)] if groups else []
            return [*norm, options.activation(owner, activation)]

        layers = [nn.Linear(self.size, math.prod(first)), nn.Unflatten(1, first), *block(first[0])]
        for i in reversed(range(doublings)):
            layers += [nn.Upsample(scale_factor=2)]
            layers += [nn.Conv2d(width << i + 1, width << i, 3, padding=1), *block(width << i)]
        layers += [nn.Conv2d(width, channels, 3, padding=1), OUTPUTS[output]()]
        self.net = nn.Sequential(*layers)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:  # [B, D] -> [B, C, H, W]
        """Return the samples."""
        return self.net(self.given(z, y))
