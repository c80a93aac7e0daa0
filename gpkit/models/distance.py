"""A perceptron that starts as a signed distance."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from gpkit import checks
from gpkit.models import options


class DistanceNet(nn.Module):
    r"""A perceptron that is about a signed distance before it is trained.

    .. math:: f(x) \approx \|x\| - \text{radius}

    Its hidden weights are drawn from N(0, 2 / width), so that a layer of ReLU keeps the length of
    its input; those of the last layer are all about :math:`\sqrt{\pi / \text{width}}`, and its
    bias is -radius. The activation is a softplus that is close to a ReLU, and smooth.

    Args:
        input_shape: the shape of one sample; it is flattened.
        num_outputs: the number of outputs, all alike at first.
        width: the number of units of each hidden layer.
        depth: the number of hidden layers.
        beta: β of the softplus, log(1 + exp(βz)) / β.
        radius: of the sphere at the start.

    Raises:
        ValueError: if an option is out of its range.

    Source: Atzmon and Lipman (2020), arXiv:1911.10414, section 4.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> f = DistanceNet((2,), 1, width=1024, depth=1, beta=1e4, radius=0.5)
    >>> x = torch.tensor([[0.6, 0.8], [0.0, -2.0]])
    >>> torch.allclose(f(x)[:, 0], torch.tensor([0.5, 1.5]), atol=0.2)
    True
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        *,
        width: int = 64,
        depth: int = 3,
        beta: float = 100.0,
        radius: float = 1.0,
    ) -> None:
        super().__init__()
        options.positive("DistanceNet", num_outputs=num_outputs, width=width, depth=depth)
        checks.number("DistanceNet(beta=...)", beta, 0, strict=True)
        checks.number("DistanceNet(radius=...)", radius, 0)
        sizes = [math.prod(input_shape)] + [width] * depth
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layer = nn.Linear(fan_in, fan_out)
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / fan_out))
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.Softplus(beta)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_outputs)
        nn.init.normal_(self.head.weight, math.sqrt(math.pi / width), 1e-4)
        nn.init.constant_(self.head.bias, -radius)

    def forward(self, x: Tensor) -> Tensor:  # [B, *input_shape] -> [B, num_outputs]
        """Return the values of the field."""
        return self.head(self.features(x.flatten(1)))
