"""Critics, of points and of images, with labels or without."""

from __future__ import annotations

from torch import Tensor, nn

from gpkit.models import options
from gpkit.models.convnet import ConvNet
from gpkit.models.labels import Labels
from gpkit.models.mlp import MLP


class Critic(nn.Module):
    r"""The score of a net that has one output, with a direction of its own for each label.

    .. math:: D(x, y) = w^\top \phi(x) + b + e_y^\top \phi(x)

    φ are the features that the last linear layer is given. Without labels there is no e.

    Args:
        net: Gives φ by `embed`, and has w and b in its `head`.
        num_classes: The number of labels; 0 for none.

    Raises:
        ValueError: If `num_classes` is no number of labels.

    Source: the projection discriminator of Miyato & Koyama (2018), arXiv:1802.05637.
    """

    def __init__(self, net: MLP | ConvNet, num_classes: int = 0) -> None:
        """Add the directions."""
        super().__init__()
        size = net.head.in_features
        self.net = net
        self.labels = Labels(
            type(self).__name__, "critic(x)", num_classes=num_classes, size=size, std=size**-0.5
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # [B, ...], [B] -> [B, 1]
        """Return the scores."""
        features = self.net.embed(x)  # [B, F]
        direction = self.labels(y)
        score = self.net.head(features)
        return score if direction is None else score + (direction * features).sum(1, keepdim=True)


class PointCritic(Critic):
    """A critic of points: an `MLP`.

    The default is ReLU, as in the literature: smooth nets of this size learn the 25 Gaussians more
    slowly. A penalty of order >= 2 wants a smooth one all the same.

    Args:
        input_shape: The shape of one sample; it is flattened.
        width: The units of each hidden layer.
        depth: The number of hidden layers.
        activation: relu, gelu, silu, softplus or tanh.
        num_classes: The number of labels; 0 for critic(x), K for critic(x, y).

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> import torch
        >>> PointCritic((2,))(torch.zeros(5, 2)).shape
        torch.Size([5, 1])
        >>> PointCritic((2,), num_classes=8)(torch.zeros(5, 2), torch.arange(5)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 3,
        activation: str = "relu",
        num_classes: int = 0,
    ) -> None:
        """Build the layers."""
        net = MLP(input_shape, 1, width=width, depth=depth, activation=activation)
        super().__init__(net, num_classes)


class ImageCritic(Critic):
    """A critic of images: a `ConvNet` that halves even sides down to at least 4, and keeps them.

    It has no batch norm, which would couple the samples and with them their slopes; group norm is
    there for the asking.

    Args:
        input_shape: The shape of one sample, (C, H, W).
        width: The channels at full size; each halving doubles them.
        groups: The groups of every group norm; 0 for no norms.
        activation: gelu, silu, softplus, tanh or relu.
        num_classes: The number of labels; 0 for critic(x), K for critic(x, y).

    Raises:
        ValueError: If the input is no image or an option is out of range.

    Examples:
        >>> import torch
        >>> ImageCritic((1, 8, 8))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        width: int = 32,
        groups: int = 0,
        activation: str = "gelu",
        num_classes: int = 0,
    ) -> None:
        """Build the layers."""
        _, *sides = options.image_shape("ImageCritic", input_shape, flat="PointCritic")
        net = ConvNet(
            input_shape,
            1,
            width=width,
            depth=1 + options.halvings(*sides),
            groups=groups,
            pool="flatten",
            activation=activation,
        )
        super().__init__(net, num_classes)
