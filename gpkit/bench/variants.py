"""The estimators that a penalty can have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from gpkit.estimators.base import Estimator
from gpkit.estimators.exact import exact
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.power_iteration import power_iteration
from gpkit.estimators.projection import projection
from gpkit.estimators.taylor import taylor
from gpkit.gradient_penalty import GradientPenalty
from gpkit.penalty import Penalty


def by_name(penalties: Any) -> dict[str, Penalty]:
    """Return penalties by name; of several with one name, the later ones have a number.

    Raises:
        TypeError: if they are no penalties.
    """
    given = [penalties] if isinstance(penalties, (Penalty, str)) else penalties
    pairs = given.items() if isinstance(given, Mapping) else [(None, p) for p in given]
    found: dict[str, Penalty] = {}
    for known, penalty in pairs:
        if not isinstance(penalty, Penalty):
            raise TypeError(
                "bench(net, penalties, example) needs penalties, such as gpkit.r1(), or a dict of "
                f"them by name; got a {type(penalty).__name__}"
            )
        name, i = penalty.name if known is None else known, 2
        while name in found:
            name, i = f"{penalty.name} {i}", i + 1
        found[name] = penalty
    return found


def variants(penalty: Penalty) -> dict[str, Penalty]:
    """Return a penalty with each estimator that estimates the same number, by its name.

    >>> import gpkit
    >>> list(variants(gpkit.r1()))
    ['exact', 'finite_difference', 'projection']
    """
    if not isinstance(penalty, GradientPenalty) or isinstance(penalty.estimator, power_iteration):
        return {"own": copy.deepcopy(penalty)}
    made: list[Estimator] = [exact(), finite_difference(), projection()]
    if penalty.order > 1 and isinstance(penalty.estimator, taylor):
        made.append(taylor())  # an estimate of another norm, for those who chose it
    if not any(type(e) is type(penalty.estimator) for e in made):
        made.append(penalty.estimator)
    found: dict[str, Penalty] = {}
    for estimator in made:
        own = penalty.estimator if type(estimator) is type(penalty.estimator) else estimator
        try:
            found[type(own).__name__] = _with(penalty, own)
        except ValueError:
            continue  # it does not take the order, the norm or the scope
    return found


def _with(penalty: GradientPenalty, estimator: Estimator) -> GradientPenalty:
    axes = {**penalty.axes(), "estimator": estimator, "every": 1}
    axes["weight"] = 1.0 if callable(penalty.weight) else penalty.weight
    if hasattr(penalty.form, "state_dict"):
        axes["form"] = copy.deepcopy(penalty.form)  # with an average of its own
    if penalty.wrt.batched:
        axes["subsample"] = None  # it is in ``at``
    made = GradientPenalty(**axes, seed=0, name=penalty.name)
    made.subsample = penalty.subsample
    return made
