"""Critics of points and of images, with or without labels."""

from __future__ import annotations

from torch import Tensor, nn

from gpkit.models import options
from gpkit.models.convnet import ConvNet
from gpkit.models.labels import Labels
from gpkit.models.mlp import MLP


class Critic(nn.Module):
    r"""A net with one output, the score, and with a learned vector e_y for each label.

    .. math:: D(x, y) = w^\top \phi(x) + b + e_y^\top \phi(x)

    φ is the input of the last linear layer, which has w and b. Without labels there is no e.

    Args:
        net: its ``embed`` gives φ, its ``head`` has w and b.
        num_classes: the number of labels; 0 for none.

    Raises:
        ValueError: if ``num_classes`` is out of its range.

    Source: the projection discriminator of Miyato and Koyama (2018), arXiv:1802.05637.
    """

    def __init__(self, net: MLP | ConvNet, num_classes: int = 0) -> None:
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
    slowly. A penalty of order >= 2 needs a smooth one.

    Args:
        input_shape: the shape of one sample; it is flattened.
        width: the number of units of each hidden layer.
        depth: the number of hidden layers.
        activation: relu, gelu, silu, softplus or tanh.
        num_classes: the number of labels: 0 for ``critic(x)``, K for ``critic(x, y)``.

    Raises:
        ValueError: if an option is out of its range.

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
        net = MLP(input_shape, 1, width=width, depth=depth, activation=activation)
        super().__init__(net, num_classes)


class ImageCritic(Critic):
    """A critic of images: a `ConvNet` that halves the sides while they are even, down to 4 or more.

    The last image is flattened, so every pixel counts. There is no batch norm, since it couples the
    samples and so their slopes; group norm is an option.

    Args:
        input_shape: the shape of one sample, (C, H, W).
        width: the number of channels at full size; each halving doubles it.
        groups: the number of groups of every group norm; 0 for no norms.
        activation: gelu, silu, softplus, tanh or relu.
        num_classes: the number of labels: 0 for ``critic(x)``, K for ``critic(x, y)``.

    Raises:
        ValueError: if the input is no image, or an option is out of its range.

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
