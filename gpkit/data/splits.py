"""Split a data set into a training, a validation and a test part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Size = int | float


def split_sizes(
    owner: str, total: int, train_size: Size | None, val_size: Size, test_size: Size
) -> tuple[int, int, int]:
    """Turn counts (int) and fractions of the whole (float, rounded down) into three counts.

    Args:
        owner: the class that has these options, for the messages.
        total: the number of samples.
        train_size: the size of the training part; None takes all that the other parts leave.
        val_size: the size of the validation part.
        test_size: the size of the test part.

    Returns:
        The counts; their sum is at most ``total``.

    Raises:
        ValueError: if a size is out of its range, or if the sum of the parts exceeds the samples.

    >>> split_sizes("Digits", 1797, None, 0.15, 0.15)
    (1259, 269, 269)
    """
    val = _count(owner, "val_size", val_size, total)
    test = _count(owner, "test_size", test_size, total)
    rest = total - val - test
    train = rest if train_size is None else _count(owner, "train_size", train_size, total)
    if not 1 <= train <= rest:
        raise ValueError(
            f"`{owner}(train_size={train_size}, val_size={val_size}, test_size={test_size})` must "
            f"fit into the {total} samples there are, with one or more to train on; got "
            f"{max(train, 0)} + {val} + {test}: change the sizes"
        )
    return train, val, test


def _count(owner: str, name: str, size: Size, total: int) -> int:
    if isinstance(size, float) and 0 <= size <= 1:
        return math.floor(round(size * total, 6))  # so that 0.29 of 100 is 29
    if isinstance(size, int) and size >= 0:
        return size
    raise ValueError(
        f"`{owner}({name}={size!r})` must be a count, as 100, or a fraction in [0, 1], as 0.15"
    )


def stratified_order(y: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order in which every stretch has the classes in their true proportions.

    The n samples of a class get random positions: the j-th of them is at (j + 1/2) / n. So a
    stretch has at most about one sample of a class more, or less, than its share.

    Args:
        y: the classes, ``[N]``; all equal for a plain shuffle.
        generator: the source of randomness.

    Returns:
        A permutation of 0 .. N - 1, ``[N]``.
    """
    shuffled = torch.randperm(len(y), generator=generator)
    place = torch.empty(len(y), dtype=torch.float64)
    for label in y.unique():
        members = (y[shuffled] == label).nonzero().squeeze(1)
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[place.argsort(stable=True)]


def split(y: Tensor, counts: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
    """Draw three disjoint, stratified sets of indices.

    Args:
        y: the classes, ``[N]``; all equal for a plain split.
        counts: the sizes of the three sets; their sum is at most N.
        generator: the source of randomness.

    Returns:
        The train, validation and test indices.
    """
    order = stratified_order(y, generator)
    return list(order[: sum(counts)].split(list(counts)))
