"""The named penalties. Each is one choice on every axis of `GradientPenalty`.

Every preset takes that class's arguments as well (``order``, ``estimator``, ``every``, ``scope``,
...), which replace its own choice. ``weight`` is the factor λ of the formula; where a paper writes
γ/2, the ½ is inside and ``weight`` is γ.
"""

from gpkit.presets.adversarial import dragan, max_gp, r1_r2, wgan_div, zero_gp
from gpkit.presets.critic import r1, r2, wgan_gp, wgan_lp
from gpkit.presets.difference import cure, gnp
from gpkit.presets.drawn import fisher
from gpkit.presets.environments import fishr, irm
from gpkit.presets.generator import path_length
from gpkit.presets.inner import contractive
from gpkit.presets.input import curvature, eikonal, input_grad_norm, jacobian
from gpkit.presets.spectral import spectral_jacobian
from gpkit.presets.uncertainty import duq
from gpkit.presets.weight import none, per_sample_grad_norm, weight_grad_norm
from gpkit.presets.weight_curvature import hessian

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
