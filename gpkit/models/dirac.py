"""The Dirac-GAN, the smallest GAN: real samples at 0, fake samples at θ, a linear critic."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiracGenerator(nn.Module):
    """A generator of one point, θ, for all latents.

    Args:
        theta: the initial θ.

    Source: Mescheder, Geiger and Nowozin (2018), arXiv:1801.04406, definition 2.1.

    >>> DiracGenerator(theta=3.0)(torch.zeros(2, 5))
    tensor([[3.],
            [3.]], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, *, theta: float = 1.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([float(theta)]))

    def forward(self, z: Tensor) -> Tensor:  # [B, D] -> [B, 1]
        """Return θ for each latent."""
        return self.theta.expand(len(z), 1)


class DiracCritic(nn.Module):
    """The critic D(x) = -ψx, with slope |ψ| everywhere.

    In the paper a critic gives fake samples the higher scores, in gpkit real samples: with the
    minus sign, θ and ψ are the same numbers as in the paper.

    Args:
        psi: the initial ψ.

    Source: Mescheder, Geiger and Nowozin (2018), arXiv:1801.04406, definition 2.1.

    >>> DiracCritic(psi=2.0)(torch.tensor([[1.0], [3.0]]))
    tensor([[-2.],
            [-6.]], grad_fn=<MulBackward0>)
    """

    def __init__(self, *, psi: float = 1.0) -> None:
        super().__init__()
        self.psi = nn.Parameter(torch.tensor([float(psi)]))

    def forward(self, x: Tensor) -> Tensor:  # [B, 1] -> [B, 1]
        """Return the scores."""
        return -self.psi * x
