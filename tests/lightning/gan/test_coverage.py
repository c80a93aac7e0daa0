"""Modes covered, against counts by hand."""

import math

import pytest
import torch

from gpkit.data import EightGaussians, TwentyFiveGaussians
from gpkit.lightning.gan.figures.coverage import modes_covered

MODES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
SAMPLES = torch.tensor(
    [
        [0.0, 2.9],  # of mode 0
        [0.0, 3.1],  # of none: 3.1 standard deviations off
        [2.5, 2.5],  # of none: close along each axis, 3.5 off
        [10.0, 0.5],  # of mode 1
        [9.0, -1.0],  # of mode 1
        [5.0, 5.0],  # of none
    ]
)


def counted(samples, modes, std, at_least=1, radius=3.0):
    """Count in plain Python."""
    counts, good = [0] * len(modes), 0
    for sample in samples.tolist():
        distances = [math.dist(sample, mode) for mode in modes.tolist()]
        if min(distances) <= radius * std:
            good += 1
            counts[distances.index(min(distances))] += 1
    return sum(count >= at_least for count in counts), good / len(samples)


def test_a_count_by_hand():
    # catches distances by axis, a strict count, and a share of the modes in place of the samples
    assert modes_covered(SAMPLES, MODES, 1.0) == (2, 0.5)
    assert modes_covered(SAMPLES, MODES, 1.0, at_least=2) == (1, 0.5)
    assert modes_covered(SAMPLES, MODES, 1.0, radius=3.2) == (2, 4 / 6)
    assert modes_covered(SAMPLES, MODES, 0.1) == (0, 0.0)


@pytest.mark.parametrize("at_least", [1, 2, 3])
def test_random_samples_are_counted_as_in_plain_python(at_least):
    # catches a wrong order of samples and modes, and a nearest mode that is the farthest
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    samples = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    expected = counted(samples, modes, 0.2, at_least, 2.0)
    assert 0 < expected[0] < 12
    assert 0 < expected[1] < 1
    assert modes_covered(samples, modes, 0.2, at_least=at_least, radius=2.0) == expected


def test_overlapping_modes_share_no_sample():
    # catches a sample that covers every mode that it is close to
    modes = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert modes_covered(torch.tensor([[0.4, 0.0]]), modes, 1.0) == (1, 1.0)


def test_small_distances_are_exact():
    # catches distances by matrix products, which float32 rounds to 0.001 at these places
    modes = TwentyFiveGaussians().modes.float() + 100
    edge = 3 * 0.05 / 2.828 * torch.tensor([[0.999, 0.0], [1.001, 0.0]])
    samples = (modes[:, None] + edge).flatten(0, 1)
    assert modes_covered(samples, modes, 0.05 / 2.828) == (25, 0.5)


@pytest.mark.parametrize("module", [EightGaussians, TwentyFiveGaussians])
def test_the_data_cover_their_own_modes(module):
    # catches modes or a deviation on another scale than the points
    data = module()
    data.setup("fit")
    x, _ = data.train_set.tensors
    covered, share = modes_covered(x, data.modes, data.std, at_least=500)
    assert covered == data.num_outputs
    error = 4 * math.sqrt(math.exp(-4.5) / len(x))
    assert share == pytest.approx(1 - math.exp(-4.5), abs=error)


def test_samples_that_are_not_numbers_cover_nothing():
    # catches a generator that has diverged and is counted as perfect
    samples = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0], [0.0, 0.0]])
    assert modes_covered(samples, MODES, 1.0) == (1, 1 / 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: modes_covered(SAMPLES[:0], MODES, 1.0), r"at least one sample; got \[0, 2\]"),
        (lambda: modes_covered(torch.zeros(4, 3), MODES, 1.0), r"modes, \[2\], .* got \[4, 3\]"),
        (lambda: modes_covered(SAMPLES, MODES, -1.0), r"std=\.\.\.\)` must be a number >= 0"),
        (lambda: modes_covered(SAMPLES, MODES, 1.0, at_least=0), r"at_least=.* >= 1; got 0"),
        (lambda: modes_covered(SAMPLES, MODES, 1.0, radius=0), r"radius=.* > 0; got 0"),
    ],
)
def test_wrong_arguments_are_refused(call, words):
    # catches a share of nothing, which is not a number
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
