"""Splits are disjoint, exact and stratified; label noise; statistics of the training part alone."""

import numpy as np
import pytest
import torch
from datasets_read import assert_standardised, parts, ready
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from gpkit.data import (
    BreastCancer,
    Diabetes,
    Digits,
    TwoMoons,
)
from gpkit.data.splits import split, split_sizes


@pytest.mark.parametrize("counts", [(700, 150, 150), (10, 3, 400), (997, 1, 2), (50, 0, 0)])
def test_splits_are_disjoint_exact_and_stratified(counts):
    # catches leaks from one part into another, and classes that are lost in a small part
    y = torch.tensor([0] * 500 + [1] * 300 + [2] * 190 + [3] * 10)
    drawn = split(y, counts, torch.Generator().manual_seed(0))
    assert tuple(len(i) for i in drawn) == counts
    assert len(torch.cat(drawn).unique()) == sum(counts)
    for indices in drawn:
        found = torch.bincount(y[indices], minlength=4)
        expected = torch.bincount(y) * len(indices) / len(y)
        assert (found - expected).abs().max() <= 1.5


def test_a_split_is_random_within_a_class():
    # catches a split that takes the first of each class
    drawn, *_ = split(torch.zeros(1000), (500, 0, 0), torch.Generator().manual_seed(0))
    assert 400 < drawn.double().mean() < 600
    assert not torch.equal(drawn, drawn.sort().values)


def test_digits_1000_0_797():
    # catches rounding, and samples that are lost or doubled: the parts are the data set
    data = ready(Digits, train_size=1000, val_size=0, test_size=797, flatten=True)
    (x, y), (x_val, _), (x_test, y_test) = parts(data)
    assert (len(x), len(x_val), len(x_test)) == (1000, 0, 797)
    images, labels = load_digits(return_X_y=True)
    rows = torch.cat([torch.cat([x, x_test]) * 16, torch.cat([y, y_test])[:, None]], 1)
    expected = np.column_stack([images, labels])
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    expected = torch.bincount(torch.from_numpy(labels)) * 1000 / 1797
    assert (torch.bincount(y) - expected).abs().max() <= 1.5


def test_flat_digits_are_the_same_pixels():
    # catches a reshape that moves pixels
    square, flat = ready(Digits), ready(Digits, flatten=True)
    assert flat.input_shape == (64,)
    assert torch.equal(square.train_set.tensors[0].flatten(1), flat.train_set.tensors[0])
    assert square.train_set.tensors[0].max() == 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((None, 0.15, 0.15), (70, 15, 15)),
        ((0.7, 0.15, 0.15), (70, 15, 15)),
        ((0.29, 0.58, 0), (29, 58, 0)),
        ((50, 0, 0.5), (50, 0, 50)),
        ((1.0, 0, 0), (100, 0, 0)),
        ((1, 0, 0), (1, 0, 0)),
    ],
)
def test_sizes_are_counts_or_fractions(sizes, expected):
    # catches 0.29 * 100 = 28.999..., and 1 taken for 1.0
    assert split_sizes("Digits", 100, *sizes) == expected


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3333, 1.0])
def test_noise_changes_the_chosen_training_labels_alone(p):
    # catches noise in test labels, a wrong count, and a split that depends on the noise
    clean, noisy = ready(Digits), ready(Digits, label_noise=p)
    (x, y), *rest = parts(clean)
    (x_noisy, y_noisy), *rest_noisy = parts(noisy)
    chosen = noisy.relabelled
    assert len(chosen.unique()) == len(chosen) == round(p * len(y))
    changed = (y != y_noisy).nonzero().squeeze(1)
    assert set(changed.tolist()) <= set(chosen.tolist())
    assert torch.equal(x, x_noisy)
    for pair, pair_noisy in zip(rest, rest_noisy, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, pair_noisy, strict=True))


def test_noise_is_uniform_over_all_ten_classes():
    # catches noise that always changes the label, and noise that depends on it
    (_, y), *_ = parts(ready(Digits))
    (_, noisy), *_ = parts(ready(Digits, label_noise=1.0))
    assert 0.06 < (y == noisy).double().mean() < 0.14  # a tenth keeps its label
    assert (torch.bincount(noisy, minlength=10) / len(noisy) - 0.1).abs().max() < 0.04


def test_noise_is_seeded_and_grows():
    # catches noise from the global random state, and levels that cannot be compared
    first, again = (ready(Digits, label_noise=0.2) for _ in range(2))
    more = ready(Digits, label_noise=0.4)
    other = ready(Digits, label_noise=0.2, seed=1)
    assert torch.equal(first.train_set.tensors[1], again.train_set.tensors[1])
    assert set(first.relabelled.tolist()) < set(more.relabelled.tolist())
    assert set(first.relabelled.tolist()) != set(other.relabelled.tolist())


def test_breast_cancer_is_standardised_by_the_training_part():
    # catches statistics of the whole, which leak, and of each part, which are inconsistent
    (x, _), (x_val, _), (x_test, _) = parts(ready(BreastCancer))
    assert_standardised(load_breast_cancer().data, x, [x_val, x_test])


def test_diabetes_is_standardised_by_the_training_part():
    # the same, and for the target
    (x, y), (x_val, y_val), (x_test, y_test) = parts(ready(Diabetes))
    raw_x, raw_y = load_diabetes(return_X_y=True, scaled=False)
    assert_standardised(raw_x, x, [x_val, x_test])
    assert_standardised(raw_y[:, None], y, [y_val, y_test])


def test_a_seed_changes_the_moons_themselves():
    # catches points that are always the same, only cut in another way
    first, other = (torch.cat([x for x, _ in parts(ready(TwoMoons, seed=seed))]) for seed in (0, 1))
    assert not torch.equal(first.sort(0).values, other.sort(0).values)


def test_moons_without_noise_lie_on_their_circles():
    # catches labels that are not carried along with the points
    for x, y in parts(ready(TwoMoons, noise=0.0)):
        centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[y]
        torch.testing.assert_close((x - centre).norm(dim=1), torch.ones(len(x)))
