"""The labels of the nets of a GAN."""

from __future__ import annotations

from torch import Tensor, nn

from gpkit import checks


class Labels(nn.Module):
    """A learned vector for each label; None for a net without labels.

    Args:
        owner: the net, for the messages.
        call: how the net is called without labels, for the messages.
        num_classes: the number of labels; 0 for none.
        size: the size of a vector.
        std: the standard deviation of the initial vectors.

    Raises:
        ValueError: if ``num_classes`` is out of its range.

    >>> import torch
    >>> Labels("Critic", "critic(x)", num_classes=5, size=3)(torch.tensor([0, 4])).shape
    torch.Size([2, 3])
    >>> Labels("Critic", "critic(x)", num_classes=0, size=3)(None) is None
    True
    """

    def __init__(
        self, owner: str, call: str, *, num_classes: int, size: int, std: float = 1.0
    ) -> None:
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
            ValueError: if labels are missing, or not expected.
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
