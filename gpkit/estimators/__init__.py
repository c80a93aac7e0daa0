"""How the squared norm n² of a derivative is obtained: one file for each estimator.

An estimator gets a `gpkit.estimators.base.Target` (what is differentiated, and with respect to
what) and returns n² ``[G]``, one for each group, with a graph. ``window`` and ``recomputable`` hold
what finite differences and micro-batches need: gradients of earlier micro-batches, and a value
together with the function that computes it again.

To add one: subclass `Estimator` in a file of its own, with one method, ``squared_norms``; name it
in ``ESTIMATORS`` below; export it in ``gpkit/__init__.py``; compare it with a closed form in
``tests/estimators``.

>>> import gpkit, torch
>>> class forward_mode(gpkit.Estimator):
...     def squared_norms(self, target, order, norm, rng):
...         (x,) = target.xs
...         (g,) = torch.autograd.grad(target.y.sum(), x, create_graph=True)
...         v = torch.randn(x.shape, generator=rng)
...         return (g * v).flatten(1).sum(1).square()
>>> penalty = gpkit.GradientPenalty(estimator=forward_mode(), seed=0)
>>> penalty(lambda x: 3 * x[:, 0], torch.ones(1000, 2)).item() > 7.0  # 9 in expectation
True
"""

from gpkit.estimators.base import Estimator
from gpkit.estimators.exact import exact
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.gaussian_product import gaussian_product
from gpkit.estimators.power_iteration import power_iteration
from gpkit.estimators.projection import projection
from gpkit.estimators.taylor import taylor

ESTIMATORS: dict[str, type[Estimator]] = {
    "exact": exact,
    "projection": projection,
    "finite_difference": finite_difference,
    "taylor": taylor,
    "power_iteration": power_iteration,
    "gaussian_product": gaussian_product,
}
