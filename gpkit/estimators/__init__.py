"""The axis `estimator`: how the squared norm n² of a derivative is computed, one file for each.

An estimator gets a `gpkit.estimators.base.Target` (the output and the variables) and returns n²
``[G]``, one for each group, with a graph. ``window`` holds the gradients of earlier micro-batches;
`Recomputable` is a value together with the function that recomputes it.

To add one: subclass `Estimator` in a new file, define ``squared_norms``, add the class to
``ESTIMATORS`` below, export it in ``gpkit/__init__.py``, and compare it with a closed form in
``tests/estimators``.

>>> import gpkit, torch
>>> class one_projection(gpkit.Estimator):  # (vᵀ∇f)², whose expected value is ‖∇f‖²
...     def squared_norms(self, target, order, norm, rng):
...         (x,) = target.xs
...         (g,) = torch.autograd.grad(target.y.sum(), x, create_graph=True)
...         v = torch.randn(x.shape, generator=rng)
...         return (g * v).flatten(1).sum(1).square()
>>> penalty = gpkit.GradientPenalty(estimator=one_projection(), seed=0)
>>> penalty(lambda x: 3 * x[:, 0], torch.ones(1000, 2)).item() > 7.0  # expected value 9
True
"""

from gpkit.estimators.base import Estimator
from gpkit.estimators.exact import exact
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.forwards.jvp import jvp
from gpkit.estimators.forwards.random_difference import random_difference
from gpkit.estimators.forwards.stencil import stencil
from gpkit.estimators.gaussian_product import gaussian_product
from gpkit.estimators.power_iteration import power_iteration
from gpkit.estimators.projection import projection
from gpkit.estimators.taylor import taylor
from gpkit.estimators.trace import trace

ESTIMATORS: dict[str, type[Estimator]] = {
    "exact": exact,
    "projection": projection,
    "finite_difference": finite_difference,
    "taylor": taylor,
    "power_iteration": power_iteration,
    "gaussian_product": gaussian_product,
    "random_difference": random_difference,
    "jvp": jvp,
    "stencil": stencil,
    "trace": trace,
}
