"""A multilayer perceptron."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.models import options


class MLP(nn.Module):
    """A multilayer perceptron of ``depth`` hidden layers: (linear, activation, dropout) each.

    The default activation is smooth: the second derivative of a ReLU net in its inputs is zero
    almost everywhere, so a penalty of order >= 2 would train nothing.

    Args:
        input_shape: the shape of one sample; it is flattened.
        num_outputs: the number of outputs; for one the result is ``[B, 1]``.
        width: the number of units of each hidden layer.
        depth: the number of hidden layers; 0 is a linear model.
        activation: gelu, silu, softplus, tanh or relu.
        dropout: the probability that a hidden unit is dropped.
        noise: the standard deviation of Gaussian noise that is added to inputs in training.

    Raises:
        ValueError: if an option is out of its range.

    >>> import torch
    >>> MLP((1, 8, 8), 10)(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_outputs: int,
        *,
        width: int = 128,
        depth: int = 2,
        activation: str = "gelu",
        dropout: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        options.positive("MLP", num_outputs=num_outputs, width=width)
        checks.integer("MLP(depth=...)", depth, 0)
        options.dropout("MLP", dropout)
        self.noise = checks.number("MLP(noise=...)", noise, 0)
        sizes = [math.prod(input_shape)] + [width] * depth
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), options.activation("MLP", activation)]
            layers += [nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], num_outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, *input_shape] -> [B, num_outputs]
        """Return the outputs (logits, values or scores)."""
        return self.head(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:  # [B, *input_shape] -> [B, head.in_features]
        """Return the features: the input of the last linear layer."""
        if self.noise and self.training:
            x = x + self.noise * torch.randn_like(x)
        return self.features(x.flatten(1))
