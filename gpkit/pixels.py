"""Pixels: the groups of an image, each with the norm of its channels alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def per_pixel(row: Tensor, x: Tensor) -> Tensor:
    """Return the derivative ``[B, C·P]`` in an ``x`` ``[B, C, *S]`` as ``[B·P, C]``, P pixels.

    >>> import torch
    >>> x = torch.zeros(1, 3, 2)  # three channels, two pixels
    >>> per_pixel(torch.arange(6).reshape(1, 6), x)
    tensor([[0, 2, 4],
            [1, 3, 5]])
    """
    return row.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def require_images(xs: tuple[Tensor, ...]) -> None:
    """Refuse inputs that have no pixels, or not the same ones.

    Raises:
        ValueError: if an input is not ``[B, C, *S]``, or two differ in S.
    """
    if any(x.ndim < 3 for x in xs) or len({x.shape[2:] for x in xs}) > 1:
        shapes = " and ".join(str(list(x.shape)) for x in xs)
        raise ValueError(
            f'`scope="pixel"` needs images [B, C, *S], the same S for all inputs; got {shapes}: '
            'use scope="sample"'
        )


def require_axes(order: int, estimator: Any, known: tuple[type, ...]) -> None:
    """Refuse axes that have no meaning for each pixel.

    Raises:
        ValueError: if the order is not one, or the estimator gives one norm a sample.
    """
    if order > 1:
        raise ValueError(
            f'`scope="pixel"` takes order=1; got order={order}: a higher derivative mixes pixels, '
            'use scope="sample"'
        )
    if not isinstance(estimator, known):
        names = " or ".join(repr(kind.__name__) for kind in known)
        raise ValueError(f'`scope="pixel"` takes estimator={names}; got {estimator!r}')
