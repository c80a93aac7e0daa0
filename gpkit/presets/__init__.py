"""Named penalties: functions that make a choice on every axis of `GradientPenalty`.

A preset makes a penalty, and the penalty makes a number that you add to the loss:

    penalty = gpkit.wgan_gp(weight=10.0)
    loss = loss + penalty(critic, real=x, fake=y)

Each preset's docstring has the formula with all of its factors, how the penalty is called, and how
``weight`` compares with the paper. All presets have this in common:

- ``weight`` is the factor λ, γ or k of the formula: a number >= 0, or a schedule, which is a
  function of the optimiser step. Where a paper writes γ/2, ``weight`` is γ and the ½ is inside.
- ``**axes`` are the other arguments of `GradientPenalty`, such as ``order``, ``estimator``,
  ``every``, ``scope``, ``forward``, ``reduce``, ``seed`` and ``name``. They replace the preset's
  own choices.
- An argument out of its range is a ValueError.

A preset belongs in the file of what it differentiates, and with respect to what:

- ``weights``: the loss, in the weights;
- ``inputs``: one number for each sample, such as its loss, in the inputs;
- ``jacobians``: several outputs, or a hidden layer, in the inputs, and higher derivatives;
- ``critics``: a critic's score, at real samples, fake samples, or points between them;
- ``approximations``: the same by differences, without a gradient in the samples;
- ``generators``: a generator's output, in its latents;
- ``policies``: of reinforcement learning;
- ``environments``: statistics of how the environments of a batch differ.

``sum`` combines several penalties, ``base`` has what all presets use.

To add one:

1. a function in its file, as below, named in both lists of this file and in ``gpkit/__init__.py``;
2. ``configs/penalty/<name>.yaml``: the function, its weight and its own options;
3. a row in the table ``ROWS`` of ``tests/support/cases.py``: how it is built and called, and its
   norms and values from an independent formula. All tests of presets then run for it;
4. a row in the README's table: formula, defaults, paper.

>>> import torch
>>> from gpkit.axes.form import norm
>>> from gpkit.gradient_penalty import Axes
>>> from gpkit.presets.base import preset
>>> def slope(weight=1.0, **axes):
...     "λ mean_i ‖∇f(x_i)‖"
...     return preset("slope", weight, Axes(wrt="input", form=norm()), axes)
>>> f = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
>>> slope(weight=2.0)(f, torch.zeros(8, 2)).item()  # 2·5
10.0
>>> slope(weight=2.0, every=16)(f, torch.zeros(8, 2)).item()  # lazily: 16 times as much
160.0
"""

from gpkit.presets.approximations import approximate_r1, approximate_r2
from gpkit.presets.critics import (
    dragan,
    max_gp,
    r1,
    r1_r2,
    r2,
    wgan_div,
    wgan_gp,
    wgan_lp,
    zero_gp,
)
from gpkit.presets.environments import fishr, irm
from gpkit.presets.generators import path_length
from gpkit.presets.inputs import cure, duq, eikonal, input_grad_norm, right_reasons, sobolev
from gpkit.presets.jacobians import contractive, curvature, jacobian, laplacian, spectral_jacobian
from gpkit.presets.policies import amp, lipschitz_policy
from gpkit.presets.weights import (
    fisher,
    gnp,
    hessian,
    none,
    per_sample_grad_norm,
    sam,
    weight_grad_norm,
)

__all__ = [
    "PRESETS",
    "amp",
    "approximate_r1",
    "approximate_r2",
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
    "laplacian",
    "lipschitz_policy",
    "max_gp",
    "none",
    "path_length",
    "per_sample_grad_norm",
    "r1",
    "r1_r2",
    "r2",
    "right_reasons",
    "sam",
    "sobolev",
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
        sam,
        input_grad_norm,
        sobolev,
        right_reasons,
        lipschitz_policy,
        cure,
        jacobian,
        contractive,
        spectral_jacobian,
        path_length,
        curvature,
        laplacian,
        eikonal,
        duq,
        wgan_gp,
        wgan_lp,
        r1,
        r2,
        r1_r2,
        approximate_r1,
        approximate_r2,
        amp,
        dragan,
        zero_gp,
        wgan_div,
        max_gp,
    )
}
