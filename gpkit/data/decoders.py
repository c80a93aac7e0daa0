"""Decode the columns of a data set to tensors: pictures, numbers and classes."""

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
    """A table whose rows are decoded when they are used.

    Args:
        table: anything with a length that gives a ``Batch`` for a list of row numbers.
        inputs: decodes the x of a batch.
        targets: decodes the y of a batch.
    """

    def __init__(self, table: Any, inputs: Decoder, targets: Decoder) -> None:
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
        """Decode the rows of a batch. A data loader calls this if a data set has it."""
        batch = self.table[indices]
        return list(zip(self.inputs(batch), self.targets(batch), strict=True))


@dataclass(frozen=True)
class Pictures:
    """Decode PIL images.

    Attributes:
        key: the column.
        mode: "L" for one channel, "RGB" for three.
        size: height and width.
        resize: whether pictures of another size are resized; if not, they are an error.
        centre: whether values lie in [-1, 1] instead of [0, 1].
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
            Its pixels, ``[H, W]`` or ``[H, W, 3]``, uint8.

        Raises:
            ValueError: if it has another size, or values without a known range.
        """
        from PIL import Image

        if image.mode.startswith("I;16"):  # PIL would clip these at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(
                f"`HuggingFace(input_key={self.key!r})` must be pictures of 8 or 16 bits; got "
                f"the PIL mode {image.mode!r}: convert them first"
            )
        height, width = self.size
        if image.size != (width, height):
            if not self.resize:
                raise ValueError(
                    "`HuggingFace(image_size=None)` needs pictures of one size; got "
                    f"{image.size[1]} x {image.size[0]} and {height} x {width}: "
                    f"set image_size=[{height}, {width}], for example"
                )
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.convert(self.mode))


@dataclass(frozen=True)
class Numbers:
    """Decode columns of numbers: (value - mean) / scale. Several columns are concatenated.

    Attributes:
        keys: the columns.
        mean: one number for each value, or one for all.
        scale: one number for each value, or one for all.
    """

    keys: tuple[str, ...]
    mean: np.ndarray | float = 0.0
    scale: np.ndarray | float = 1.0

    def __call__(self, batch: Batch) -> Tensor:  # [B, D], or [B, *S] for one column of arrays
        """Decode the numbers of a batch."""
        standard = (self.raw(batch) - self.mean) / self.scale
        return torch.from_numpy(standard.astype(np.float32))

    def raw(self, batch: Batch) -> np.ndarray:
        """Return the numbers as the table has them, in float64.

        Raises:
            ValueError: if one is missing.
        """
        columns = [np.asarray(batch[key], dtype=np.float64) for key in self.keys]
        for key, column in zip(self.keys, columns, strict=True):
            if np.isnan(column).any():
                raise ValueError(
                    f"`HuggingFace` needs a number in every row; column {key!r} has a missing one: "
                    "fill it in, or choose other columns with input_key"
                )
        if len(columns) == 1 and columns[0].ndim > 1:
            return columns[0]
        return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)

    def standardised(self, batches: Callable[[], Iterable[Batch]], count: int) -> Numbers:
        """Return a decoder that standardises with the statistics of these rows.

        Args:
            batches: starts a pass over the rows; there are two passes.
            count: the number of rows.

        Returns:
            The decoder.
        """
        mean = sum(self.raw(batch).sum(0) for batch in batches()) / count
        variance = sum(np.square(self.raw(batch) - mean).sum(0) for batch in batches()) / count
        return Numbers(self.keys, mean, np.where(variance > 0, np.sqrt(variance), 1.0))


@dataclass(frozen=True)
class Classes:
    """Decode labels to the numbers 0 .. K - 1.

    Attributes:
        key: the column.
        values: the K labels, in order.
    """

    key: str
    values: tuple[Hashable, ...]

    def __call__(self, batch: Batch) -> Tensor:  # [B], int64
        """Decode the labels of a batch."""
        number = {value: i for i, value in enumerate(self.values)}
        return torch.tensor([number[label] for label in batch[self.key]], dtype=torch.int64)
