"""Options that several nets have: the activations by name, and checks of values."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from gpkit import checks

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


def activation(owner: str, name: str) -> nn.Module:
    """Return a new module of the activation with this name.

    Args:
        owner: the class that has the option, for the message.
        name: gelu, silu, softplus or tanh, which are smooth; or relu, whose second derivative is
            zero.

    Raises:
        ValueError: if there is no such activation.
    """
    return ACTIVATIONS[checks.choice(f"{owner}(activation=...)", name, ACTIVATIONS)]()


def positive(owner: str, **values: int) -> None:
    """Check that every value is an integer >= 1.

    Raises:
        ValueError: if one is not.
    """
    for name, value in values.items():
        checks.integer(f"{owner}({name}=...)", value, 1)


def dropout(owner: str, value: float) -> float:
    """Return ``value`` if it is the probability of a dropout, in [0, 1).

    Raises:
        ValueError: if it is not.
    """
    if checks.number(f"{owner}(dropout=...)", value, 0) >= 1:
        raise ValueError(f"`{owner}(dropout={value!r})` must lie in [0, 1); use 0.0 for none")
    return value


def groups(owner: str, width: int, value: int) -> None:
    """Check that ``width`` channels can be normalised in ``value`` groups; 0 is for no norms.

    Raises:
        ValueError: if the channels are no multiple of the groups.
    """
    if checks.integer(f"{owner}(groups=...)", value, 0) and width % value:
        raise ValueError(
            f"`{owner}(width={width}, groups={value})` must have a width that is a multiple "
            f"of groups; use groups={math.gcd(width, value)}"
        )


def image_shape(
    owner: str, shape: tuple[int, ...], name: str = "input_shape", flat: str = "MLP"
) -> tuple[int, int, int]:
    """Return channels, height and width, if one sample is an image.

    Args:
        owner: the class that has the option, for the message.
        shape: the shape of one sample.
        name: the name of the option.
        flat: the class that takes flat samples, for the message.

    Raises:
        ValueError: if the shape is not (C, H, W).
    """
    if len(shape) != 3:
        raise ValueError(
            f"`{owner}({name}={tuple(shape)})` must be an image (C, H, W); "
            f"use `{flat}` for flat samples, or keep the images unflattened"
        )
    channels, height, width = shape
    return channels, height, width


def halvings(height: int, width: int) -> int:
    """Return how often both sides of an image can be halved: while they are even, down to 4.

    >>> halvings(8, 8), halvings(28, 28), halvings(64, 32), halvings(7, 8)
    (1, 2, 3, 0)
    """
    times = 0
    while all((side >> times) % 2 == 0 and side >> times + 1 >= 4 for side in (height, width)):
        times += 1
    return times
