"""Digits whose colour predicts the label in training, and misleads at test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from gpkit import checks
from gpkit.data.arrays import ArrayDataModule, Pair, SplitOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ColoredDigits(ArrayDataModule):
    """Digits below 5 or not, ``[2, 8, 8]``: one channel for each colour, of which one is zero.

    The label is whether the digit is below 5, flipped at random for a share of the images. The
    colour agrees with the label as often as ``agreement`` says, for each environment of the
    training images. At test it agrees seldom. So the colour predicts better in training than the
    shape, and is wrong at test; the shape is right for ``1 - label_noise`` everywhere. Batches are
    ``(x, y, env)``, with the environment of each sample, which penalties as `gpkit.irm` take.

    The digits are few. Each training image is there several times, with flips and colours of its
    own; without these copies a net learns the flips by heart, and no method generalises.

    Args:
        label_noise: the share of the labels that is flipped, in [0, 1].
        agreement: how often the colour agrees with the label, for each training environment.
        test_agreement: the same at test, which is an environment of its own.
        copies: of each training image.
        grey: whether both channels are the image, so that no colour can be seen: the oracle.
        passes: how often an epoch goes over the training images.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`; sizes are of images, before they are copied. The
            validation images are of the training environments.

    Raises:
        ValueError: if an option is out of its range.

    Source: Arjovsky et al. (2019), arXiv:1907.02893, who colour MNIST.

    >>> data = ColoredDigits(train_size=1297, val_size=0, test_size=500)
    >>> data.setup("fit")
    >>> data.input_shape, data.num_outputs, len(data.train_set), len(data.test_set)
    ((2, 8, 8), 2, 10376, 500)
    >>> x, y, env = data.train_set.tensors
    >>> colour = x[:, 1].flatten(1).any(1)
    >>> [round((colour == y)[env == e].float().mean().item(), 1) for e in (0, 1)]
    [0.8, 0.9]
    """

    task = "classification"
    num_outputs = 2

    def __init__(
        self,
        label_noise: float = 0.25,
        agreement: Sequence[float] = (0.8, 0.9),
        test_agreement: float = 0.1,
        copies: int = 8,
        grey: bool = False,
        passes: int = 1,
        *,
        batch_size: int = 64,
        **options: Unpack[SplitOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.label_noise = _share("label_noise", label_noise)
        if not agreement:
            raise ValueError("`ColoredDigits(agreement=[])` must have a share for each environment")
        self.agreement = [_share("agreement", a) for a in agreement]
        self.test_agreement = _share("test_agreement", test_agreement)
        self.copies = checks.integer("ColoredDigits(copies=...)", copies, 1)
        self.grey = grey
        self.passes = checks.integer("ColoredDigits(passes=...)", passes, 1)

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts, with the environments."""
        images, digits = load_digits(return_X_y=True)
        x = torch.from_numpy(images / 16).reshape(-1, 8, 8)
        train, val, test = self.cut(x, torch.from_numpy(digits), generator)
        copies = tuple(torch.cat([t] * self.copies) for t in train)
        count = len(self.agreement)
        parts = []
        for x, digit in (copies, val):
            env = torch.arange(len(x)) % count
            agreement = torch.tensor(self.agreement)[env]
            parts.append(self._coloured(x, digit, agreement, env, generator))
        x, digit = test
        env, agreement = torch.full((len(x),), count), torch.full((len(x),), self.test_agreement)
        return [*parts, self._coloured(x, digit, agreement, env, generator)]

    def _coloured(
        self,
        x: Tensor,
        digit: Tensor,
        agreement: Tensor,
        env: Tensor,
        generator: torch.Generator,
    ) -> Pair:
        """Return images ``[B, 2, 8, 8]``, labels and environments."""
        flipped, differs = torch.rand(2, len(x), generator=generator)
        label = (digit < 5) ^ (flipped < self.label_noise)
        colour = label ^ (differs >= agreement)
        both = torch.stack([~colour, colour], dim=1)[:, :, None, None]
        shown = x[:, None] * (torch.ones_like(both) if self.grey else both)
        return shown, label, env


def _share(name: str, value: float) -> float:
    if checks.number(f"ColoredDigits({name}=...)", value, 0) > 1:
        raise ValueError(f"`ColoredDigits({name}={value!r})` must lie in [0, 1], as 0.25")
    return value
