"""The named penalties. Each is one choice on every axis of `GradientPenalty`.

Every preset takes that class's arguments as well (``order``, ``estimator``, ``every``, ``scope``,
...), which replace its own choice. ``weight`` is the factor λ of the formula; where a paper writes
γ/2, the ½ is inside and ``weight`` is γ.
"""

from gpkit.presets.critic import r1, r2, wgan_gp, wgan_lp
from gpkit.presets.difference import cure, gnp
from gpkit.presets.input import curvature, eikonal, input_grad_norm, jacobian
from gpkit.presets.weight import none, weight_grad_norm

PRESETS = {
    preset.__name__: preset
    for preset in (
        none,
        weight_grad_norm,
        gnp,
        input_grad_norm,
        cure,
        jacobian,
        curvature,
        eikonal,
        wgan_gp,
        wgan_lp,
        r1,
        r2,
    )
}
