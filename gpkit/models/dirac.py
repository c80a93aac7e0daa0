"""The Dirac-GAN, the smallest GAN there is: real samples at 0, fake ones at θ, a linear critic."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiracGenerator(nn.Module):
    """The point θ, whatever the latents are.

    Args:
        theta: θ at the beginning.

    Source: Mescheder, Geiger & Nowozin (2018), arXiv:1801.04406, definition 2.1.

    Examples:
        >>> DiracGenerator(theta=3.0)(torch.zeros(2, 5))
        tensor([[3.],
                [3.]], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, *, theta: float = 1.0) -> None:
        """Make θ."""
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([float(theta)]))

    def forward(self, z: Tensor) -> Tensor:  # [B, D] -> [B, 1]
        """Return θ for every latent."""
        return self.theta.expand(len(z), 1)


class DiracCritic(nn.Module):
    """The scores D(x) = -ψx, of slope |ψ| everywhere.

    The sign lets (θ, ψ) be those of the paper, where fake samples are to have the higher scores;
    here it is real ones.

    Args:
        psi: ψ at the beginning.

    Source: Mescheder, Geiger & Nowozin (2018), arXiv:1801.04406, definition 2.1.

    Examples:
        >>> DiracCritic(psi=2.0)(torch.tensor([[1.0], [3.0]]))
        tensor([[-2.],
                [-6.]], grad_fn=<MulBackward0>)
    """

    def __init__(self, *, psi: float = 1.0) -> None:
        """Make ψ."""
        super().__init__()
        self.psi = nn.Parameter(torch.tensor([float(psi)]))

    def forward(self, x: Tensor) -> Tensor:  # [B, 1] -> [B, 1]
        """Return the scores."""
        return -self.psi * x
