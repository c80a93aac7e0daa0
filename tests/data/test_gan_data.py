"""The sets of points that GANs are tried on, against the formulas of Gulrajani et al. (2017)."""

import math

import pytest
import torch
from sklearn.datasets import make_swiss_roll

from gpkit.data import Digits, EightGaussians, Gaussian, SwissRoll, TwentyFiveGaussians

DIAGONAL = 2 / math.sqrt(2)
EIGHT = [(2, 0), (-2, 0), (0, 2), (0, -2)] + [
    (a * DIAGONAL, b * DIAGONAL) for a in (1, -1) for b in (1, -1)
]
GRID = [(i, j) for i in (-4, -2, 0, 2, 4) for j in (-4, -2, 0, 2, 4)]
MIXTURES = [(EightGaussians, EIGHT, 0.02, 1.414), (TwentyFiveGaussians, GRID, 0.05, 2.828)]
mixtures = pytest.mark.parametrize(("module", "centres", "noise", "scale"), MIXTURES)


def ready(module, *args, **options):
    data = module(*args, **options)
    data.setup("fit")
    return data


def everything(data):
    """Return x and y of the three parts together."""
    tensors = (dataset.tensors for dataset in (data.train_set, data.val_set, data.test_set))
    return (torch.cat(part) for part in zip(*tensors, strict=True))


def sorted_rows(points):
    return sorted((round(x, 6), round(y, 6)) for x, y in points)


@mixtures
def test_modes_lie_where_the_paper_has_them(module, centres, noise, scale):
    # catches a radius of 1, a grid that is not stretched, and a division that is forgotten
    data = module()
    expected = [(x / scale, y / scale) for x, y in centres]
    assert sorted_rows(data.modes.tolist()) == sorted_rows(expected)
    assert data.std == pytest.approx(noise / scale)


@mixtures
def test_points_scatter_round_the_mode_of_their_class(module, centres, noise, scale):
    # catches labels that are not carried along, and noise that is not divided with the points
    data = ready(module)
    x, y = everything(data)
    offset = x - data.modes[y].float()
    assert torch.bincount(y).tolist() == [25_000 // len(centres)] * len(centres)
    assert offset.square().mean().sqrt().item() == pytest.approx(noise / scale, rel=0.02)
    assert offset.mean(0).abs().max() < 4 * noise / scale / math.sqrt(25_000)
    covariance = (offset[:, 0] * offset[:, 1]).mean() / (noise / scale) ** 2
    assert covariance.abs() < 4 / math.sqrt(25_000)


@mixtures
def test_the_data_has_about_unit_variance(module, centres, noise, scale):
    # catches a scale other than the root of the variance, which is what the divisors are
    x, _ = everything(ready(module))
    per_axis = sum(cx**2 for cx, _ in centres) / len(centres)
    assert x.var(0).mean().item() == pytest.approx((per_axis + noise**2) / scale**2, rel=0.01)
    assert x.var(0).mean().item() == pytest.approx(1, rel=0.01)


@mixtures
def test_without_noise_the_points_are_the_modes(module, centres, noise, scale):
    # catches noise that the option does not reach
    data = ready(module, n=100, noise=0.0)
    x, y = everything(data)
    assert torch.equal(x, data.modes[y].float())


def test_one_gaussian_has_its_mean_and_deviation():
    # catches a mean that is not added, a variance for a deviation, and dimensions that share a draw
    x, y = everything(ready(Gaussian, mean=[3.0, -1.0, 0.5], std=0.5))
    assert x.shape == (25_000, 3)
    assert not y.any()
    normal = (x - torch.tensor([3.0, -1.0, 0.5])) / 0.5
    assert normal.mean(0).abs().max() < 4 / math.sqrt(25_000)
    covariance = normal.T @ normal / 25_000
    assert (covariance - torch.eye(3)).abs().max() < 4 * math.sqrt(2 / 25_000)
    kurtosis = normal.pow(4).mean().item()
    assert kurtosis == pytest.approx(3, abs=0.1)


def test_a_gaussian_without_deviation_is_a_point():
    x, _ = everything(ready(Gaussian, mean=(0.25,), std=0.0, n=30))
    assert torch.equal(x, torch.full((30, 1), 0.25))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": 2.0}, r"`Gaussian\(mean=...\)` must be a list of numbers.*got 2.0"),
        ({"mean": []}, r"must be a list of numbers.*got \[\]"),
        ({"mean": [0.0, "a"]}, r"`Gaussian\(mean=...\)\[1\]` must be a number; got 'a'"),
        ({"std": -1.0}, r"`Gaussian\(std=...\)` must be a number >= 0; got -1"),
        ({"n": 0}, r"`Gaussian\(n=...\)` must be an integer >= 1; got 0"),
    ],
)
def test_a_gaussian_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Gaussian(**options)


def test_the_roll_is_that_of_scikit_learn():
    # catches another curve, range or divisor, and a position that is not along it
    x, y = everything(ready(SwissRoll, n=2000, noise=0.0))
    points, t = make_swiss_roll(500, random_state=0)  # its positions t, and no noise
    position = torch.from_numpy((t - t.min()) / (t.max() - t.min()))
    assert 0 <= y.min() < 0.01 < 0.99 < y.max() <= 1
    nearest = (y - position.float()).abs().argmin(0)
    distance = (x[nearest] * 7.5 - torch.from_numpy(points[:, [0, 2]])).norm(dim=1)
    assert distance.max() < 0.5  # 2000 positions leave gaps of up to about 0.01 x 14.2
    t = 1.5 * math.pi * (1 + 2 * y[:, 0].double())
    exact = torch.stack([t * t.cos(), t * t.sin()], dim=1) / 7.5
    torch.testing.assert_close(x, exact.float(), atol=1e-5, rtol=0)


def test_the_noise_of_the_roll_is_divided_with_it():
    # catches noise that is added after the division
    clean, noisy = (everything(ready(SwissRoll, noise=noise)) for noise in (0.0, 0.25))
    (x, y), (x_noisy, y_noisy) = clean, noisy
    assert torch.equal(y, y_noisy)
    offset = x_noisy - x
    assert offset.square().mean().sqrt().item() == pytest.approx(0.25 / 7.5, rel=0.02)
    assert (offset[:, 0] * offset[:, 1]).mean().abs() < 4 * (0.25 / 7.5) ** 2 / math.sqrt(25_000)


def test_digits_suit_a_sigmoid():
    # catches pixels outside of [0, 1], and a docstring that no longer holds
    x, _ = everything(ready(Digits))
    assert (x.min(), x.max()) == (0, 1)
    assert 0.45 < (x == 0).float().mean() < 0.55
