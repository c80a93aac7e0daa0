"""What the options of the nets share: the activations by name, and the checks of a value."""

from __future__ import annotations

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
    """Build the activation called `name`.

    Args:
        owner: The class whose option this is, for the message.
        name: One of gelu, silu, softplus, tanh (smooth) and relu, whose second derivative is zero.

    Returns:
        A new module.

    Raises:
        ValueError: If there is no such activation.
    """
    return ACTIVATIONS[checks.choice(f"{owner}(activation=...)", name, ACTIVATIONS)]()


def positive(owner: str, **values: int) -> None:
    """Check that every value is a whole number of at least one.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        checks.integer(f"{owner}({name}=...)", value, 1)


def dropout(owner: str, value: float) -> float:
    """Check that `value` is a probability of dropping a unit, in [0, 1).

    Returns:
        The value.

    Raises:
        ValueError: If it is not.
    """
    if checks.number(f"{owner}(dropout=...)", value, 0) >= 1:
        raise ValueError(f"`{owner}(dropout={value!r})` must lie in [0, 1); use 0.0 for none")
    return value


def image_shape(owner: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Check that one sample is an image.

    Returns:
        Its channels, height and width.

    Raises:
        ValueError: If the shape is not (C, H, W).
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"`{owner}(input_shape={tuple(input_shape)})` must be an image (C, H, W); "
            "use `MLP` for flat inputs, or keep the images unflattened"
        )
    channels, height, width = input_shape
    return channels, height, width
