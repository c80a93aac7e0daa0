"""Directional derivatives by one forward-mode pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows
from gpkit.autodiff.numerics import shaped, widened
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Estimator, Target, require_gradient, require_inputs
from gpkit.estimators.projection import DISTRIBUTIONS, projection


@dataclass(frozen=True)
class jvp(Estimator):
    r"""Derivatives along random directions, by forward mode: one backward pass trains them.

    .. math:: n^2 = \frac1N \sum_{j=1}^N \|J v_j\|^2, \quad E[v v^\top] = I

    J is the Jacobian of all outputs together, so n² has the expected value ‖J‖_F², without a step
    and its error. For f = w·x one draw has the variance 2 (‖w‖⁴ - Σ w_i⁴) with random signs, and
    2‖w‖⁴ with Gaussian v. A form that takes a root is biased, see `projection`. It takes N passes
    in forward mode, about twice as dear as a forward pass, after one for the value, and one
    ordinary backward pass. Every operation of the function must have a forward-mode derivative.

    Args:
        n: N, the number of directions.
        distribution: the distribution of v: "rademacher" (±1), "gaussian", or "sphere".

    Raises:
        ValueError: if ``n`` < 1, or ``distribution`` is another name.
        RuntimeError: in the call, if an operation has no forward-mode derivative.

    Source: Griewank and Walther (2008), Evaluating Derivatives, chapter 3.

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(estimator=jvp(distribution="gaussian"), seed=0)
    >>> f = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> round(penalty(f, torch.zeros(100_000, 2)).item())  # 3² + 4²
    25
    """

    n: int = 1
    distribution: str = "rademacher"

    reuses_graph = False
    elementary = True  # those of torch's layer and batch norm have a wrong gradient
    compares = True

    def __post_init__(self) -> None:
        checks.integer("jvp(n=...)", self.n, 1)
        checks.choice("jvp(distribution=...)", self.distribution, DISTRIBUTIONS)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but the l2 norm of a first derivative in inputs."""
        require_gradient(self, order)
        require_inputs(self, norm, batched)

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return the estimate of n² ``[G]``, differentiable, in float32 or better.

        Args:
            target: an output with inputs as variables, and its function.
            order: 1.
            norm: "l2".
            rng: the random numbers of the directions.

        Returns:
            n² ``[G]``.

        Raises:
            ValueError: if the target has no function of its own samples.
            RuntimeError: if an operation has no forward-mode derivative.
        """
        evaluate, compared = target.function(self), target.compared
        flat = tuple(as_rows(x.detach(), True) for x in target.xs)
        draws = []
        for _ in range(self.n):
            vs = projection(1, self.distribution).draw(flat, rng)
            vs = vs if compared is None else compared.times(vs)
            tangents = tuple(shaped(v, x) for v, x in zip(vs, target.xs, strict=True))
            tangent = self.along(evaluate, target.xs, tangents)
            slope = widened(tangent)  # [G, m]
            if compared is not None:
                slope = slope - compared.along(vs).reshape(len(slope), -1)
            draws.append(slope.square().sum(1))
        return torch.stack(draws).mean(0)

    def along(
        self,
        evaluate: Callable[..., Tensor],
        xs: tuple[Tensor, ...],
        tangents: tuple[Tensor, ...],
    ) -> Tensor:
        """Return J v ``[G, m]``.

        Raises:
            RuntimeError: if an operation has no forward-mode derivative.
        """
        with warnings.catch_warnings():
            # torch compiles some forward-mode formulas with it at their first use
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprec", DeprecationWarning)
            try:
                # The dual numbers of torch.autograd have a wrong graph through softmax.
                found: Tensor = torch.func.jvp(evaluate, xs, tangents)[1]
            except (RuntimeError, NotImplementedError) as error:
                if not any(word in str(error) for word in ("forward AD", "functorch", "jvp")):
                    raise
                raise RuntimeError(
                    "`estimator=jvp()` needs a forward-mode derivative of every operation "
                    f"({str(error).splitlines()[0]}): use estimator='exact' or "
                    "gpkit.random_difference()"
                ) from error
            return found
