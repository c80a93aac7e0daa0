"""How the columns of a data set become tensors: pictures, numbers and classes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = dict[str, list[Any]]  # column -> one entry a row


Decoder = Callable[[Batch], Tensor]


class Rows(Dataset):
    """A table whose rows are decoded when they are asked for.

    Args:
        table: Anything with a length that gives a `Batch` for a list of row numbers.
        inputs: Decodes the x of a batch.
        targets: Decodes the y of a batch.
    """

    def __init__(self, table: Any, inputs: Decoder, targets: Decoder) -> None:
        """Keep the table as it is."""
        self.table = table
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode one row."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Decode the rows of a batch; a data loader calls this when it is there."""
        batch = self.table[indices]
        return list(zip(self.inputs(batch), self.targets(batch), strict=True))


@dataclass(frozen=True)
class Pictures:
    """Decode PIL images.

    Attributes:
        key: The column.
        mode: "L" for one channel, "RGB" for three.
        size: Height and width.
        resize: Whether other sizes are resized; if not, they are an error.
        centre: Whether values lie in [-1, 1] in place of [0, 1].
    """

    key: str
    mode: str
    size: tuple[int, int]
    resize: bool
    centre: bool

    def __call__(self, batch: Batch) -> Tensor:  # [B, C, H, W]
        """Decode the pictures of a batch."""
        pixels = np.stack([self.pixels(image) for image in batch[self.key]])
        x = torch.from_numpy(pixels).to(torch.float32) / 255
        x = x.unsqueeze(1) if self.mode == "L" else x.permute(0, 3, 1, 2).contiguous()
        return 2 * x - 1 if self.centre else x

    def pixels(self, image: Any) -> np.ndarray:
        """Decode one picture.

        Returns:
            Its pixels, uint8 [H, W] or [H, W, 3].

        Raises:
            ValueError: If it has another size, or values that have no natural range.
        """
        from PIL import Image

        if image.mode.startswith("I;16"):  # PIL would clip these at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(
                f"`HuggingFace(input_key={self.key!r})` must hold pictures of 8 or 16 bits, but "
                f"one has the PIL mode {image.mode!r}; convert them first"
            )
        height, width = self.size
        if image.size != (width, height):
            if not self.resize:
                raise ValueError(
                    "`HuggingFace(image_size=None)` must have pictures of one size, but found "
                    f"{image.size[1]} x {image.size[0]} beside {height} x {width}; "
                    f"set image_size=[{height}, {width}], for instance"
                )
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.convert(self.mode))


@dataclass(frozen=True)
class Numbers:
    """Decode columns of numbers; several are put side by side.

    Attributes:
        keys: The columns.
        mean: What is subtracted.
        scale: What the difference is divided by.
    """

    keys: tuple[str, ...]
    mean: np.ndarray | float = 0.0
    scale: np.ndarray | float = 1.0

    def __call__(self, batch: Batch) -> Tensor:  # [B, D], or [B, *S] for one column of arrays
        """Decode the numbers of a batch."""
        standard = (self.raw(batch) - self.mean) / self.scale
        return torch.from_numpy(standard.astype(np.float32))

    def raw(self, batch: Batch) -> np.ndarray:
        """Return the numbers as they are, in float64.

        Raises:
            ValueError: If one is missing.
        """
        columns = [np.asarray(batch[key], dtype=np.float64) for key in self.keys]
        for key, column in zip(self.keys, columns, strict=True):
            if np.isnan(column).any():
                raise ValueError(
                    f"`HuggingFace` must have a number in every row, but column {key!r} has a "
                    "missing one; fill it in, or choose other columns by input_key"
                )
        if len(columns) == 1 and columns[0].ndim > 1:
            return columns[0]
        return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)

    def standardised(self, batches: Callable[[], Iterable[Batch]], count: int) -> Numbers:
        """Return a decoder that standardises by the statistics of these rows, in two passes.

        Args:
            batches: Starts a pass over the rows.
            count: The number of rows.
        """
        mean = sum(self.raw(batch).sum(0) for batch in batches()) / count
        variance = sum(np.square(self.raw(batch) - mean).sum(0) for batch in batches()) / count
        return Numbers(self.keys, mean, np.where(variance > 0, np.sqrt(variance), 1.0))


@dataclass(frozen=True)
class Classes:
    """Decode labels into the numbers 0 .. K - 1.

    Attributes:
        key: The column.
        values: The K labels, in order.
    """

    key: str
    values: tuple[Hashable, ...]

    def __call__(self, batch: Batch) -> Tensor:  # [B], int64
        """Decode the labels of a batch."""
        number = {value: i for i, value in enumerate(self.values)}
        return torch.tensor([number[label] for label in batch[self.key]], dtype=torch.int64)
