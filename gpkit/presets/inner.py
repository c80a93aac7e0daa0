"""Penalties of what lies inside a net: h, a named activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.activations import activation as named
from gpkit.estimators import projection
from gpkit.penalty import Axes, GradientPenalty
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


def contractive(
    weight: float | Schedule = 0.1, activation: str = "features", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the Jacobian of a hidden layer in the inputs, as a contractive auto-encoder does.

    .. math:: \lambda \, \text{mean}_i \, \Big\|\frac{\partial h(x_i)}{\partial x_i}\Big\|_F^2

    There is no ½ inside. Called ``penalty(net, x)`` with ``x`` ``[B, *S]`` and the net that has the
    layer, or ``penalty(h, x)`` with an ``h`` ``[B, *H]`` of an ``x`` that requires grad. A sigmoid
    layer of weights W has :math:`\sum_j (h_j (1 - h_j))^2 \|W_j\|^2`.

    Args:
        weight: λ.
        activation: the name of the layer, as in ``net.named_modules()``; "features" is all but the
            head of gpkit's own ``mlp`` and ``convnet``.
        **axes: of `GradientPenalty`; ``estimator`` is ``projection(1)``, one backward pass;
            "exact" takes one for each entry of h.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Rifai et al. (2011), https://icml.cc/2011/papers/455_icmlpaper.pdf.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> penalty = contractive(weight=1.0, activation="0", estimator="exact")
    >>> penalty(net, torch.zeros(5, 2)).item()  # ‖W‖² = 30
    30.0
    """
    return preset(
        "contractive",
        weight,
        Axes(of=named(activation), wrt="input", estimator=projection(1)),
        axes,
    )
