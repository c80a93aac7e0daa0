"""gpkit: train neural networks with gradient penalties.

Importing gpkit loads nothing else. Each name below loads its module on first use; torch, Lightning
and Hydra are loaded only if that module needs them.

- The two kinds of penalty: GradientPenalty, EnvironmentPenalty.
- Presets for weights: weight_grad_norm, per_sample_grad_norm, fisher, hessian, gnp, sam,
  none.
- Presets for inputs: input_grad_norm, sobolev, right_reasons, lipschitz_policy, eikonal, duq, cure,
  jacobian, curvature, laplacian, contractive, spectral_jacobian.
- Presets for critics and generators: wgan_gp, wgan_lp, r1, r2, r1_r2, approximate_r1,
  approximate_r2, amp, dragan, zero_gp, wgan_div, max_gp, path_length.
- Presets for environments: irm, fishr.
- Several penalties: sum. In the state of a module: register_penalty.
- Variables (`wrt`): inputs, weights, activation, Variables.
- Forms (`form`): squared, norm, two_sided, one_sided, absolute, power,
  running_average, Form.
- Points (`at`): interpolate, perturb, uniform, mixture, At.
- Estimators: exact, projection, finite_difference, taylor, power_iteration, random_difference, jvp,
  stencil, trace, Estimator.
- Weights (`weight`): warmup, cosine, switch, rescaled, lazy_adam, Weight, target_norm,
  gradient_share.
- Environments: Statistic.
- Derivatives: derivative, directional_derivative, elementary, features, in_penalty,
  unsharded.
- A loss with penalties as one graph: compile.
- Lightning: GradientPenaltyCallback, GradientNormMonitor, PenalizedModule, GANModule.
- Before training: check_penalty, diagnose, prepare.
- The application: train, load, bench.

``from gpkit import *`` does not import `sum` and `compile`, which would shadow the builtins.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "At",
    "EnvironmentPenalty",
    "Estimator",
    "Form",
    "GANModule",
    "GradientNormMonitor",
    "GradientPenalty",
    "GradientPenaltyCallback",
    "PenalizedModule",
    "Statistic",
    "Variables",
    "Weight",
    "absolute",
    "activation",
    "amp",
    "approximate_r1",
    "approximate_r2",
    "bench",
    "check_penalty",
    "contractive",
    "cosine",
    "cure",
    "curvature",
    "derivative",
    "diagnose",
    "directional_derivative",
    "dragan",
    "duq",
    "eikonal",
    "elementary",
    "exact",
    "features",
    "finite_difference",
    "fisher",
    "fishr",
    "gnp",
    "gradient_share",
    "hessian",
    "in_penalty",
    "input_grad_norm",
    "inputs",
    "interpolate",
    "irm",
    "jacobian",
    "jvp",
    "laplacian",
    "lazy_adam",
    "lipschitz_policy",
    "load",
    "max_gp",
    "mixture",
    "none",
    "norm",
    "one_sided",
    "path_length",
    "per_sample_grad_norm",
    "perturb",
    "power",
    "power_iteration",
    "prepare",
    "projection",
    "r1",
    "r1_r2",
    "r2",
    "random_difference",
    "register_penalty",
    "rescaled",
    "right_reasons",
    "running_average",
    "sam",
    "sobolev",
    "spectral_jacobian",
    "squared",
    "stencil",
    "switch",
    "target_norm",
    "taylor",
    "trace",
    "train",
    "two_sided",
    "uniform",
    "unsharded",
    "warmup",
    "weight_grad_norm",
    "weights",
    "wgan_div",
    "wgan_gp",
    "wgan_lp",
    "zero_gp",
]

if TYPE_CHECKING:  # for type checkers and editors; `_HOMES` has the same names at run time
    from gpkit.app.load import load as load
    from gpkit.app.train import train as train
    from gpkit.autodiff.activations import features as features
    from gpkit.autodiff.isolation import in_penalty as in_penalty
    from gpkit.autodiff.norm_layers import elementary as elementary
    from gpkit.autodiff.sharding.gathering import unsharded as unsharded
    from gpkit.autodiff.taylor.directional import directional_derivative as directional_derivative
    from gpkit.axes.activation import activation as activation
    from gpkit.axes.adaptive import gradient_share as gradient_share
    from gpkit.axes.adaptive import target_norm as target_norm
    from gpkit.axes.at import At as At
    from gpkit.axes.at import interpolate as interpolate
    from gpkit.axes.at import perturb as perturb
    from gpkit.axes.average import running_average as running_average
    from gpkit.axes.environments import Statistic as Statistic
    from gpkit.axes.form import Form as Form
    from gpkit.axes.form import absolute as absolute
    from gpkit.axes.form import norm as norm
    from gpkit.axes.form import one_sided as one_sided
    from gpkit.axes.form import power as power
    from gpkit.axes.form import squared as squared
    from gpkit.axes.form import two_sided as two_sided
    from gpkit.axes.mixtures import mixture as mixture
    from gpkit.axes.mixtures import uniform as uniform
    from gpkit.axes.parameters import weights as weights
    from gpkit.axes.weight import Weight as Weight
    from gpkit.axes.weight import cosine as cosine
    from gpkit.axes.weight import lazy_adam as lazy_adam
    from gpkit.axes.weight import rescaled as rescaled
    from gpkit.axes.weight import switch as switch
    from gpkit.axes.weight import warmup as warmup
    from gpkit.axes.wrt import Variables as Variables
    from gpkit.axes.wrt import inputs as inputs
    from gpkit.bench.measure import bench as bench
    from gpkit.compiling.entry import compile as compile
    from gpkit.doctor.diagnose import diagnose as diagnose
    from gpkit.doctor.gradcheck.check_penalty import check_penalty as check_penalty
    from gpkit.doctor.prepare import prepare as prepare
    from gpkit.environment_penalty import EnvironmentPenalty as EnvironmentPenalty
    from gpkit.estimators.base import Estimator as Estimator
    from gpkit.estimators.exact import exact as exact
    from gpkit.estimators.finite_difference import finite_difference as finite_difference
    from gpkit.estimators.forwards.jvp import jvp as jvp
    from gpkit.estimators.forwards.random_difference import random_difference as random_difference
    from gpkit.estimators.forwards.stencil import stencil as stencil
    from gpkit.estimators.power_iteration import power_iteration as power_iteration
    from gpkit.estimators.projection import projection as projection
    from gpkit.estimators.taylor import taylor as taylor
    from gpkit.estimators.trace import trace as trace
    from gpkit.exact_derivative import derivative as derivative
    from gpkit.gradient_penalty import GradientPenalty as GradientPenalty
    from gpkit.lightning.callback import GradientPenaltyCallback as GradientPenaltyCallback
    from gpkit.lightning.gan import GANModule as GANModule
    from gpkit.lightning.module import PenalizedModule as PenalizedModule
    from gpkit.lightning.monitor import GradientNormMonitor as GradientNormMonitor
    from gpkit.presets import amp as amp
    from gpkit.presets import approximate_r1 as approximate_r1
    from gpkit.presets import approximate_r2 as approximate_r2
    from gpkit.presets import contractive as contractive
    from gpkit.presets import cure as cure
    from gpkit.presets import curvature as curvature
    from gpkit.presets import dragan as dragan
    from gpkit.presets import duq as duq
    from gpkit.presets import eikonal as eikonal
    from gpkit.presets import fisher as fisher
    from gpkit.presets import fishr as fishr
    from gpkit.presets import gnp as gnp
    from gpkit.presets import hessian as hessian
    from gpkit.presets import input_grad_norm as input_grad_norm
    from gpkit.presets import irm as irm
    from gpkit.presets import jacobian as jacobian
    from gpkit.presets import laplacian as laplacian
    from gpkit.presets import lipschitz_policy as lipschitz_policy
    from gpkit.presets import max_gp as max_gp
    from gpkit.presets import none as none
    from gpkit.presets import path_length as path_length
    from gpkit.presets import per_sample_grad_norm as per_sample_grad_norm
    from gpkit.presets import r1 as r1
    from gpkit.presets import r1_r2 as r1_r2
    from gpkit.presets import r2 as r2
    from gpkit.presets import right_reasons as right_reasons
    from gpkit.presets import sam as sam
    from gpkit.presets import sobolev as sobolev
    from gpkit.presets import spectral_jacobian as spectral_jacobian
    from gpkit.presets import weight_grad_norm as weight_grad_norm
    from gpkit.presets import wgan_div as wgan_div
    from gpkit.presets import wgan_gp as wgan_gp
    from gpkit.presets import wgan_lp as wgan_lp
    from gpkit.presets import zero_gp as zero_gp
    from gpkit.presets.sum import sum as sum
    from gpkit.sums import register_penalty as register_penalty
else:
    from importlib import import_module as _import_module

    _HOMES = {
        "gpkit.app.load": "load",
        "gpkit.app.train": "train",
        "gpkit.bench.measure": "bench",
        "gpkit.doctor.diagnose": "diagnose",
        "gpkit.doctor.prepare": "prepare",
        "gpkit.compiling.entry": "compile",
        "gpkit.exact_derivative": "derivative",
        "gpkit.autodiff.activations": "features",
        "gpkit.autodiff.isolation": "in_penalty",
        "gpkit.autodiff.norm_layers": "elementary",
        "gpkit.autodiff.sharding.gathering": "unsharded",
        "gpkit.autodiff.taylor.directional": "directional_derivative",
        "gpkit.axes.adaptive": "gradient_share target_norm",
        "gpkit.axes.at": "At interpolate perturb",
        "gpkit.axes.mixtures": "mixture uniform",
        "gpkit.axes.environments": "Statistic",
        "gpkit.axes.average": "running_average",
        "gpkit.axes.form": "Form absolute norm one_sided power squared two_sided",
        "gpkit.axes.weight": "Weight cosine lazy_adam rescaled switch warmup",
        "gpkit.axes.activation": "activation",
        "gpkit.axes.parameters": "weights",
        "gpkit.axes.wrt": "Variables inputs",
        "gpkit.doctor.gradcheck.check_penalty": "check_penalty",
        "gpkit.environment_penalty": "EnvironmentPenalty",
        "gpkit.estimators.base": "Estimator",
        "gpkit.estimators.exact": "exact",
        "gpkit.estimators.finite_difference": "finite_difference",
        "gpkit.estimators.power_iteration": "power_iteration",
        "gpkit.estimators.projection": "projection",
        "gpkit.estimators.taylor": "taylor",
        "gpkit.estimators.trace": "trace",
        "gpkit.estimators.forwards.jvp": "jvp",
        "gpkit.estimators.forwards.random_difference": "random_difference",
        "gpkit.estimators.forwards.stencil": "stencil",
        "gpkit.gradient_penalty": "GradientPenalty",
        "gpkit.lightning.callback": "GradientPenaltyCallback",
        "gpkit.lightning.gan": "GANModule",
        "gpkit.lightning.module": "PenalizedModule",
        "gpkit.lightning.monitor": "GradientNormMonitor",
        "gpkit.presets": (
            "amp approximate_r1 approximate_r2 contractive cure curvature dragan duq eikonal "
            "fisher fishr gnp hessian input_grad_norm irm jacobian laplacian lipschitz_policy "
            "max_gp none path_length per_sample_grad_norm r1 r1_r2 r2 right_reasons sam "
            "sobolev spectral_jacobian weight_grad_norm wgan_div wgan_gp wgan_lp zero_gp"
        ),
        "gpkit.presets.sum": "sum",
        "gpkit.sums": "register_penalty",
    }
    _HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            from gpkit.checks import nearest

            raise AttributeError(f"module 'gpkit' has no attribute {name!r}{nearest(name, _HOME)}")
        globals()[name] = value = getattr(_import_module(_HOME[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted([*_HOME, "__version__"])
