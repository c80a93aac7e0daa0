"""What the figures of a GAN show: surfaces, points and images."""

import math

import numpy as np
import pytest
import torch

from gpkit.lightning.gan.figures import drawings
from gpkit.lightning.gan.figures.callback import scores


def test_a_surface_has_its_values_where_they_belong():
    # catches axes that are exchanged or upside down
    def critic(points):
        return points[:, :1].sin() + points[:, 1:].square()

    values = drawings.surface(critic, (-1, 3, 0, 2), steps=5)
    by_hand = [[math.sin(-1 + j) + (i / 2) ** 2 for j in range(5)] for i in range(5)]
    torch.testing.assert_close(values, torch.tensor(by_hand))
    assert not values.requires_grad


def test_maps_of_scores_are_averaged():
    # catches scores of patches that are taken for points
    def patches(points):
        return torch.stack([points, 3 * points], dim=1)  # [P, 2, 2]

    values = drawings.surface(patches, (0, 1, 0, 1), steps=2)
    torch.testing.assert_close(values, torch.tensor([[0.0, 1.0], [1.0, 2.0]]))


def test_with_labels_the_surface_is_the_mean_over_labels():
    # catches a mean over the data, in which frequent labels count more
    def critic(x, y):
        return x[:, :1] + y[:, None]

    x, y = torch.randn(3, 2), torch.tensor([1, 1, 1, 4])
    torch.testing.assert_close(scores(critic, x, y), x[:, :1] + 2.5)
    many = torch.arange(1000)
    assert scores(critic, x, many).shape == (3, 1)


def test_samples_lie_on_the_surface_where_they_are():
    # catches a surface that is drawn upside down beneath its points
    box = (0.0, 1.0, 0.0, 1.0)
    values = drawings.surface(lambda p: p[:, 1] + 0.01 * p[:, 0], box)  # high values above
    nowhere = torch.tensor([[9.0, 9.0]])
    figure = drawings.draw_surface(values, box, nowhere, nowhere)
    axes = figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == (box[:2], box[2:])
    pixels = drawings.rendered(figure).astype(int)
    window = axes.get_window_extent()
    column, top = int(window.x0 + window.width / 4), pixels.shape[0] - window.y1
    low = pixels[int(top + 0.9 * window.height), column]
    high = pixels[int(top + 0.1 * window.height), column]
    assert low.sum() > high.sum() + 100  # the colours darken upwards


def test_a_constant_critic_can_be_drawn():
    # catches contours of a constant, of which matplotlib warns, and of what is not a number
    points = torch.randn(5, 2)
    for value in (0.0, float("nan")):
        values = torch.full((9, 9), value)
        assert len(drawings.draw_surface(values, (-1, 1, -1, 1), points, points).axes) == 1


def test_data_and_samples_have_their_places():
    # catches panels that are exchanged
    data, samples = torch.zeros(1, 2), torch.ones(3, 2)
    left, right = drawings.draw_points(data, samples, (-1, 2, -1, 2)).axes
    assert (left.get_title(), right.get_title()) == ("data", "samples")
    assert left.collections[0].get_offsets().tolist() == data.tolist()
    assert right.collections[0].get_offsets().tolist() == samples.tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_images_are_shown_on_the_scale_of_the_data(channels, low, high):
    # catches pixels of [-1, 1] that are clipped at 0, and a scale of the samples' own
    data = torch.full((4, channels, 2, 2), low)
    data[0] = high
    samples = torch.full((4, channels, 2, 2), (low + high) / 2)
    left, right = drawings.draw_images(data, samples, columns=2).axes
    shown = [np.asarray(axes.images[0].get_array()) for axes in (left, right)]
    assert [s.shape[:2] for s in shown] == [(5, 5), (5, 5)]
    assert (shown[0][:2, :2] == 1).all()
    assert (shown[0][:2, 3:] == 0).all()
    assert (shown[1][3:, 3:] == 0.5).all()


def test_tiles_lie_in_rows():
    # catches images that are cut, turned or laid out by columns
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 2, 3)
    tiles = drawings.tile(images, columns=3)
    assert tiles.shape == (2, 5, 11)
    assert tiles[1, 0, ::4].tolist() == [0, 1, 2]
    assert tiles[0, 4, 2::4].tolist() == [3, 4, 5]
    assert (tiles[:, 2] == 1).all()


def test_a_box_holds_all_points():
    # catches a box that is not square, and one without extent
    points = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    left, right, bottom, top = drawings.box_around(points, margin=0.1)
    assert (left, right, bottom, top) == pytest.approx((-0.2, 2.2, -0.7, 1.7))
    assert drawings.box_around(torch.zeros(3, 2)) == (-1, 1, -1, 1)


def test_drawing_leaves_no_state_behind():
    # catches figures that pyplot keeps, and a backend that is chosen for the user
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), plt.get_backend()
    points = torch.randn(5, 2)
    pixels = drawings.rendered(drawings.draw_points(points, points, (-1, 1, -1, 1)))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (420, 800, 3))
    assert plt.get_fignums() == before
    assert plt.get_backend() == backend
