"""Figures of a GAN: samples beside the data, and the surface of the critic's scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

Box = tuple[float, float, float, float]  # left, right, bottom, top
DATA, SAMPLES = "#d95f02", "#1b7837"  # colours


def box_around(points: Tensor, margin: float = 0.15) -> Box:
    """Return a square that contains all points, with a margin.

    Args:
        points: ``[N, 2]``.
        margin: margin on each side, as a fraction of the larger extent of the points.

    Returns:
        Left, right, bottom and top.

    >>> box_around(torch.tensor([[0.0, 1.0], [4.0, 3.0]]), margin=0.25)
    (-1.0, 5.0, -1.0, 5.0)
    """
    low, high = points.amin(0).double(), points.amax(0).double()
    half = (0.5 + margin) * (high - low).max().item() or 1.0
    x, y = ((low + high) / 2).tolist()
    return x - half, x + half, y - half, y + half


def surface(critic: Callable[[Tensor], Tensor], box: Box, steps: int = 100) -> Tensor:
    """Return the scores of a critic on a grid in the plane.

    Args:
        critic: points ``[P, 2]`` -> scores ``[P]``, or ``[P, ...]``, whose mean is taken.
        box: left, right, bottom and top of the grid.
        steps: number of points along each side.

    Returns:
        The scores, ``[steps, steps]``: rows from bottom to top, columns from left to right.

    >>> surface(lambda points: points @ torch.tensor([1.0, 10.0]), (0, 2, 0, 1), steps=3)
    tensor([[ 0.,  1.,  2.],
            [ 5.,  6.,  7.],
            [10., 11., 12.]])
    """
    left, right, bottom, top = box
    y, x = torch.meshgrid(
        torch.linspace(bottom, top, steps), torch.linspace(left, right, steps), indexing="ij"
    )
    points = torch.stack([x.flatten(), y.flatten()], dim=1)
    with torch.no_grad():
        values = critic(points)
    return values.reshape(len(points), -1).mean(1).reshape(steps, steps)


def draw_points(data: Tensor, samples: Tensor, box: Box) -> Figure:
    """Draw samples beside the data.

    Args:
        data: points of the data, ``[N, 2]``.
        samples: points of the generator, ``[M, 2]``.
        box: the part of the plane that is shown.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained")
    for axes, points, color, title in zip(
        figure.subplots(1, 2), (data, samples), (DATA, SAMPLES), ("data", "samples"), strict=True
    ):
        _scatter(axes, points, color, title)
        _frame(axes, box)
        axes.set_title(title)
    return figure


def draw_surface(values: Tensor, box: Box, data: Tensor, samples: Tensor) -> Figure:
    """Draw contours of the critic's scores, with data and samples on top.

    Args:
        values: scores from `surface`, ``[steps, steps]``. If some are not finite, or all are equal,
            there are no contours.
        box: the box of these scores.
        data: points of the data, ``[N, 2]``.
        samples: points of the generator, ``[M, 2]``.

    Returns:
        The figure.
    """
    left, right, bottom, top = box
    x = np.linspace(left, right, values.shape[1])
    y = np.linspace(bottom, top, values.shape[0])
    figure = Figure(figsize=(6, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    if values.isfinite().all() and values.max() > values.min():
        height = values.double().cpu().numpy()
        filled = axes.contourf(x, y, height, levels=24, cmap="PuBu", alpha=0.8)
        axes.contour(x, y, height, levels=24, colors="white", linewidths=0.5, linestyles="-")
        figure.colorbar(filled, ax=axes, label="critic")
    _scatter(axes, data, DATA, "data")
    _scatter(axes, samples, SAMPLES, "samples")
    _frame(axes, box)
    figure.legend(loc="outside upper center", ncols=2, markerscale=4)
    return figure


def draw_images(data: Tensor, samples: Tensor, columns: int = 8) -> Figure:
    """Draw a grid of samples beside a grid of images of the data.

    Both are scaled by the minimum and maximum of the data.

    Args:
        data: images, ``[N, C, H, W]`` with C 1 or 3.
        samples: images, ``[M, C, H, W]``.
        columns: number of columns of each grid.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8, 4.2), dpi=100, layout=ConstrainedLayoutEngine(wspace=0.05))
    low, high = data.min(), data.max()
    for axes, images, title in zip(
        figure.subplots(1, 2), (data, samples), ("data", "samples"), strict=True
    ):
        shown = ((images - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        picture = tile(shown, columns).permute(1, 2, 0).float().cpu().numpy()  # [H, W, C]
        axes.imshow(
            picture.squeeze(2) if picture.shape[2] == 1 else picture, "gray", vmin=0, vmax=1
        )
        axes.set_axis_off()
        axes.set_title(title)
    return figure


def tile(images: Tensor, columns: int) -> Tensor:
    """Lay images out in a grid, with lines of ones between them.

    Args:
        images: ``[N, C, H, W]``.
        columns: number of images in a row; the last row is filled up with ones.

    Returns:
        One image, ``[C, rows * (H + 1) - 1, columns * (W + 1) - 1]``.

    >>> tile(torch.tensor([0.0, 0.2, 0.4]).reshape(3, 1, 1, 1), columns=2)
    tensor([[[0.0000, 1.0000, 0.2000],
             [1.0000, 1.0000, 1.0000],
             [0.4000, 1.0000, 1.0000]]])
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cells = images.new_ones(rows * columns, channels, height + 1, width + 1)
    cells[:count, :, :height, :width] = images
    grid = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)  # [C, rows, H, columns, W]
    return grid.reshape(channels, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]


def rendered(figure: Figure) -> np.ndarray:
    """Return the pixels of a figure, uint8 ``[H, W, 3]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _scatter(axes: Axes, points: Tensor, color: str, label: str) -> None:
    x, y = points.double().cpu().numpy().T
    axes.scatter(x, y, s=4, c=color, alpha=0.5, linewidths=0, label=label)


def _frame(axes: Axes, box: Box) -> None:
    axes.set(xlim=box[:2], ylim=box[2:], aspect="equal")
