"""Groups of runs that differ in the seed alone: their means, and the paired tests."""

import math

import numpy as np
import pytest

from gpkit.report.groups import best_group, holm, paired, tabulate, varied_keys
from gpkit.report.read import find


def table_of(place, *more, **options):
    return tabulate(find([place, *more]).runs, **options)


def by_name(table):
    return {group.name: group for group in table.groups}


def test_a_group_is_what_differs_in_the_seed_alone(study):
    table = table_of(study)
    assert table.keys == ["penalty", "penalty.weight"]
    assert table.metric == "test/acc"
    groups = by_name(table)
    assert groups.keys() == {"none", "r1 weight=0.1", "r1 weight=1", "fisher weight=1"}
    values = [0.80, 0.90, 0.85]
    spread = groups["r1 weight=1"].spread("test/acc")
    assert (spread.mean, spread.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert spread.n == 3
    assert groups["r1 weight=1"].spread("nothing") is None
    assert best_group(table).name == "r1 weight=1"
    assert best_group(table_of(study, metric="test/loss")).name == "r1 weight=1"


def p_value(mean, std):
    """Return that of three differences: with two degrees of freedom it has a closed form."""
    t = mean / (std / math.sqrt(3))
    return 1 - t / math.sqrt(t * t + 2)


def test_groups_are_compared_with_no_penalty_seed_by_seed(study):
    groups = by_name(table_of(study))
    assert groups["none"].is_baseline
    assert groups["none"].against is None
    r1 = groups["r1 weight=0.1"].against
    assert r1.gain.mean == pytest.approx(0.05)  # 0.05, 0.03, 0.07
    assert r1.gain.std == pytest.approx(0.02)
    assert r1.p == pytest.approx(p_value(0.05, 0.02))
    smaller = p_value(0.14, 0.04)
    stronger = groups["r1 weight=1"].against
    assert stronger.p == pytest.approx(smaller)
    # of two: the third has no test
    assert stronger.holm == r1.holm == pytest.approx(2 * smaller)
    fisher = groups["fisher weight=1"].against
    assert fisher.gain.mean == pytest.approx(-0.1)
    assert math.isnan(fisher.p)  # equal differences have no spread


def test_only_seeds_that_both_have_are_paired():
    found = paired({0: 1.0, 1: 5.0, 3: 3.0, 4: 9.0}, {3: 1.0, 0: 0.0, 1: 2.0, 2: 100.0})
    assert found.gain.n == 3
    assert found.gain.mean == pytest.approx(2.0)  # 1, 3, 2
    assert found.p == pytest.approx(p_value(2, 1))
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert math.isnan(paired({0: 1.0}, {0: 3.0}).p)
    assert math.isnan(paired({0: 0.1, 1: 0.3}, {0: 0.0, 1: 0.2}).p)  # equal up to rounding


def test_p_values_are_corrected_for_their_number():
    assert holm([]) == []
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.001, 0.04, 0.01, 0.03]) == pytest.approx([0.004, 0.06, 0.03, 0.06])


def test_a_baseline_has_the_same_other_options(put, place):
    for width, gain in ((8, 0.1), (16, 0.2)):
        for seed in (0, 1):
            config = {"config": {"model": {"width": width}}}
            for penalty, more in (("none", 0.0), ("r1", gain + seed / 100)):
                value = width / 100 + more
                folder = f"{penalty}{width}{seed}"
                put(penalty, 1.0, seed, {"test/acc": value}, folder, **config)
    table = table_of(place)
    assert table.keys == ["penalty", "penalty.weight", "model.width"]
    gains = {g.values["model.width"]: g.against.gain.mean for g in table.groups if g.against}
    assert gains == pytest.approx({8: 0.105, 16: 0.205})


def test_another_baseline_may_be_asked_for(study):
    groups = by_name(table_of(study, baseline={"penalty": "r1", "penalty.weight": "0.1"}))
    assert [name for name, g in groups.items() if g.is_baseline] == ["r1 weight=0.1"]
    assert groups["none"].against.gain.mean == pytest.approx(-0.05)
    with pytest.raises(
        ValueError, match=r"--baseline penalty=r2: no group has this; there are .*none; r1"
    ):
        table_of(study, baseline={"penalty": "r2"})


def test_a_metric_that_no_run_has_is_told(study):
    with pytest.raises(ValueError, match=r"`--metric` must be one of .*did you mean 'test/acc'"):
        table_of(study, metric="test/ac")


def test_a_run_that_lacks_the_metric_is_not_counted(put, study):
    put("r1", 1.0, 7, {"test/acc": None, "test/loss": 0.5})
    group = by_name(table_of(study))["r1 weight=1"]
    assert (group.spread("test/acc").n, group.spread("test/loss").n) == (3, 4)


def test_single_runs_are_told_apart_by_what_they_chose(put, place):
    """One typed its penalty and the other took the default."""
    put("none", 0.1, 0, {"test/acc": 0.1}, "a")
    put("r1", 0.1, 0, {"test/acc": 0.2}, "b", varied={})
    runs = [run.result for run in find([place]).runs]
    assert varied_keys(runs)[0] == "penalty"
    assert {g.name.split()[0] for g in table_of(place).groups} == {"none", "r1"}


def test_an_option_of_two_sweeps_that_nobody_typed_separates_their_runs(put, place):
    put("r1", 0.1, 0, {"test/acc": 0.1}, "one/0")
    put("r1", 0.1, 0, {"test/acc": 0.2}, "two/0", config={"model": {"width": 99}})
    table = table_of(place)
    assert table.keys == ["model.width"]
    assert [g.values["model.width"] for g in table.groups] == [8, 99]
