"""gpkit: train neural networks with gradient penalties.

Importing gpkit loads nothing else: each name loads its module, and torch, Lightning or Hydra with
it, when it is first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; at run time `_HOMES` says the same
    from gpkit.derivatives import derivative
    from gpkit.differences import curvature_difference, finite_difference
    from gpkit.estimators import exact, projection
    from gpkit.forms import norm, one_sided, power, squared, two_sided
    from gpkit.lightning.module import PenalizedModule
    from gpkit.penalty import GradientPenalty, Terms
    from gpkit.points import fake, interpolate, perturb, real
    from gpkit.presets import (
        cure,
        curvature,
        eikonal,
        gnp,
        input_grad_norm,
        jacobian,
        none,
        r1,
        r2,
        weight_grad_norm,
        wgan_gp,
        wgan_lp,
    )
    from gpkit.schedules import cosine, switch, warmup
    from gpkit.sums import PenaltySum, sum
    from gpkit.training import train
    from gpkit.variables import inputs, weights

__version__ = "0.1.0"

_HOMES = {
    "gpkit.derivatives": "derivative",
    "gpkit.differences": "curvature_difference finite_difference",
    "gpkit.estimators": "exact projection",
    "gpkit.forms": "norm one_sided power squared two_sided",
    "gpkit.lightning.module": "PenalizedModule",
    "gpkit.penalty": "GradientPenalty Terms",
    "gpkit.points": "fake interpolate perturb real",
    "gpkit.presets": "cure curvature eikonal gnp input_grad_norm jacobian none r1 r2 "
    "weight_grad_norm wgan_gp wgan_lp",
    "gpkit.schedules": "cosine switch warmup",
    "gpkit.sums": "PenaltySum sum",
    "gpkit.training": "train",
    "gpkit.variables": "inputs weights",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gpkit' has no attribute {name!r}")
    globals()[name] = value = getattr(_import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
