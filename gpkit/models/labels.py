"""How the nets of a GAN look up their labels."""

from __future__ import annotations

from torch import Tensor, nn

from gpkit import checks


class Labels(nn.Module):
    """A vector for each of the labels of a net that may have none.

    Args:
        owner: The net, for the messages.
        call: How the net is called without labels, for the messages.
        num_classes: The number of labels; 0 for none.
        size: That of a vector.
        std: The standard deviation of its entries at first.

    Raises:
        ValueError: If `num_classes` is no number of labels.

    Examples:
        >>> import torch
        >>> Labels("Critic", "critic(x)", num_classes=5, size=3)(torch.tensor([0, 4])).shape
        torch.Size([2, 3])
        >>> Labels("Critic", "critic(x)", num_classes=0, size=3)(None) is None
        True
    """

    def __init__(
        self, owner: str, call: str, *, num_classes: int, size: int, std: float = 1.0
    ) -> None:
        """Draw the vectors."""
        super().__init__()
        self.owner = owner
        self.call = call
        self.num_classes = checks.integer(f"{owner}(num_classes=...)", num_classes, 0)
        if num_classes:
            self.table = nn.Embedding(num_classes, size)
            nn.init.normal_(self.table.weight, std=std)

    def forward(self, y: Tensor | None) -> Tensor | None:  # [B] -> [B, size]
        """Return the vectors, or None for a net without labels.

        Raises:
            ValueError: If labels are missing, or if there are labels that are not expected.
        """
        if y is None and self.num_classes:
            raise ValueError(
                f"`{self.owner}(num_classes={self.num_classes})` must be called with labels, as "
                f"`{self.call[:-1]}, y)`, but got none; use num_classes=0 for a net without labels"
            )
        if y is not None and not self.num_classes:
            raise ValueError(
                f"`{self.owner}(num_classes=0)` must be called without labels, as `{self.call}`, "
                "but got some; set num_classes to their number"
            )
        return None if y is None else self.table(y)
