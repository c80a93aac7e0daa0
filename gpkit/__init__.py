"""gpkit: train neural networks with gradient penalties.

Importing gpkit loads nothing else: each name loads its module, and torch, Lightning or Hydra with
it, when it is first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; at run time `_HOMES` says the same
    from gpkit.activations import activation
    from gpkit.adaptive import gradient_share, target_norm
    from gpkit.averages import running_average
    from gpkit.classifier import features
    from gpkit.derivatives import derivative
    from gpkit.differences import finite_difference
    from gpkit.estimators import exact, projection, taylor
    from gpkit.forms import norm, one_sided, power, squared, two_sided
    from gpkit.lightning.callback import GradientPenaltyCallback
    from gpkit.lightning.gan import GANModule
    from gpkit.lightning.module import PenalizedModule
    from gpkit.lightning.monitor import GradientNormMonitor
    from gpkit.mixtures import mixture, uniform
    from gpkit.penalty import GradientPenalty
    from gpkit.points import interpolate, perturb
    from gpkit.presets import (
        contractive,
        cure,
        curvature,
        dragan,
        duq,
        eikonal,
        fisher,
        fishr,
        gnp,
        hessian,
        input_grad_norm,
        irm,
        jacobian,
        max_gp,
        none,
        path_length,
        per_sample_grad_norm,
        r1,
        r1_r2,
        r2,
        spectral_jacobian,
        weight_grad_norm,
        wgan_div,
        wgan_gp,
        wgan_lp,
        zero_gp,
    )
    from gpkit.schedules import cosine, lazy_adam, rescaled, switch, warmup
    from gpkit.spectral import power_iteration
    from gpkit.sums import sum
    from gpkit.training import train
    from gpkit.variables import weights

__version__ = "0.1.0"

_HOMES = {
    "gpkit.activations": "activation",
    "gpkit.adaptive": "gradient_share target_norm",
    "gpkit.averages": "running_average",
    "gpkit.classifier": "features",
    "gpkit.derivatives": "derivative",
    "gpkit.differences": "finite_difference",
    "gpkit.estimators": "exact projection taylor",
    "gpkit.forms": "norm one_sided power squared two_sided",
    "gpkit.lightning.callback": "GradientPenaltyCallback",
    "gpkit.lightning.gan": "GANModule",
    "gpkit.lightning.module": "PenalizedModule",
    "gpkit.lightning.monitor": "GradientNormMonitor",
    "gpkit.mixtures": "mixture uniform",
    "gpkit.penalty": "GradientPenalty",
    "gpkit.points": "interpolate perturb",
    "gpkit.presets": (
        "contractive "
        "cure "
        "curvature "
        "dragan "
        "duq "
        "eikonal "
        "fisher "
        "fishr "
        "gnp "
        "hessian "
        "input_grad_norm "
        "irm "
        "jacobian "
        "max_gp "
        "none "
        "path_length "
        "per_sample_grad_norm "
        "r1 "
        "r1_r2 "
        "r2 "
        "spectral_jacobian "
        "weight_grad_norm "
        "wgan_div "
        "wgan_gp "
        "wgan_lp "
        "zero_gp "
    ),
    "gpkit.schedules": "cosine lazy_adam rescaled switch warmup",
    "gpkit.spectral": "power_iteration",
    "gpkit.sums": "sum",
    "gpkit.training": "train",
    "gpkit.variables": "weights",
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
