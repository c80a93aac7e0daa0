"""The named penalties. Each is one choice on every axis of `GradientPenalty`.

Every preset takes that class's arguments as well (``order``, ``estimator``, ``every``, ``scope``,
...), which replace its own choice. ``weight`` is the factor λ of the formula; where a paper writes
γ/2, the ½ is inside and ``weight`` is γ.
"""

from gpkit.presets.critics import dragan, max_gp, r1, r1_r2, r2, wgan_div, wgan_gp, wgan_lp, zero_gp
from gpkit.presets.environments import fishr, irm
from gpkit.presets.generators import path_length
from gpkit.presets.inputs import cure, duq, eikonal, input_grad_norm
from gpkit.presets.jacobians import contractive, curvature, jacobian, spectral_jacobian
from gpkit.presets.weights import fisher, gnp, hessian, none, per_sample_grad_norm, weight_grad_norm

__all__ = [
    "PRESETS",
    "contractive",
    "cure",
    "curvature",
    "dragan",
    "duq",
    "eikonal",
    "fisher",
    "fishr",
    "gnp",
    "hessian",
    "input_grad_norm",
    "irm",
    "jacobian",
    "max_gp",
    "none",
    "path_length",
    "per_sample_grad_norm",
    "r1",
    "r1_r2",
    "r2",
    "spectral_jacobian",
    "weight_grad_norm",
    "wgan_div",
    "wgan_gp",
    "wgan_lp",
    "zero_gp",
]

PRESETS = {
    preset.__name__: preset
    for preset in (
        none,
        weight_grad_norm,
        per_sample_grad_norm,
        fisher,
        irm,
        fishr,
        hessian,
        gnp,
        input_grad_norm,
        cure,
        jacobian,
        contractive,
        spectral_jacobian,
        path_length,
        curvature,
        eikonal,
        duq,
        wgan_gp,
        wgan_lp,
        r1,
        r2,
        r1_r2,
        dragan,
        zero_gp,
        wgan_div,
        max_gp,
    )
}
