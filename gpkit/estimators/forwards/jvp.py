"""Directional derivatives by one forward-mode pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows
from gpkit.autodiff.numerics import shaped, widened
from gpkit.autodiff.random import Source
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.estimators.base import Begun, Estimator, Target, require_gradient, require_inputs
from gpkit.estimators.compared import Compared
from gpkit.estimators.projection import DISTRIBUTIONS, projection


@dataclass(frozen=True)
class jvp(Estimator):
    r"""Derivatives along random directions, by forward mode: one backward pass trains them.

    .. math:: n^2 = \frac1N \sum_{j=1}^N \|J v_j\|^2, \quad E[v v^\top] = I

    J is the Jacobian of all outputs together, so n² has the expected value ‖J‖_F², without a step
    and its error. For f = w·x one draw has the variance 2 (‖w‖⁴ - Σ w_i⁴) with random signs, and
    2‖w‖⁴ with Gaussian v. A form that takes a root is biased, see `projection`. It takes N passes
    in forward mode, each about twice as dear as a forward pass, and one ordinary backward pass; in
    an activation one forward pass more, which finds it. Every operation of the function must have
    a forward-mode derivative.

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
        draws = []
        for i in range(self.n):
            if i == 0 and isinstance(target.series, Along):
                along = target.series
            else:
                vs = self.directions(target.xs, rng, compared)
                along = Along(self.along(evaluate, target.xs, vs)[1], vs)
            slope = widened(along.tangent)  # [G, m]
            if compared is not None:
                slope = slope - compared.along(along.vs).reshape(len(slope), -1)
            draws.append(slope.square().sum(1))
        return torch.stack(draws).mean(0)

    def begun(
        self,
        function: Callable[..., list[Tensor]],
        xs: tuple[Tensor, ...],
        order: int,
        rng: Source,
        step: int,
        metrics: tuple[Tensor, ...] | None,
    ) -> Begun:
        """Run the function in forward mode along the first directions; it gives the value too."""
        vs = self.directions(xs, rng, None if metrics is None else Compared(None, metrics))
        scores, tangents = self.along(function, xs, vs)
        return Begun(scores, [Along(tangent, vs) for tangent in tangents], xs)

    def directions(
        self, xs: tuple[Tensor, ...], rng: Source, compared: Compared | None
    ) -> list[Tensor]:
        """Return random directions v ``[G, n]``, or A ∘ v for a metric A."""
        flat = tuple(as_rows(x.detach(), True) for x in xs)
        vs = projection(1, self.distribution).draw(flat, rng)
        return vs if compared is None else compared.directed(vs)

    def along(
        self, evaluate: Callable[..., Any], xs: tuple[Tensor, ...], vs: Sequence[Tensor]
    ) -> tuple[Any, Any]:
        """Return f(x) and J v, ``[G, m]`` each, or lists of such.

        Raises:
            RuntimeError: if an operation has no forward-mode derivative.
        """
        tangents = tuple(shaped(v, x) for v, x in zip(vs, xs, strict=True))
        with nullcontext() if TRACES else warnings.catch_warnings():
            if not TRACES:  # torch compiles some forward-mode formulas with it at their first use
                warnings.filterwarnings("ignore", "`torch.jit.script` is dep", DeprecationWarning)
            try:
                # The dual numbers of torch.autograd have a wrong graph through softmax.
                value, tangent = torch.func.jvp(evaluate, xs, tangents)[:2]
            except (RuntimeError, NotImplementedError) as error:
                if not any(word in str(error) for word in ("forward AD", "functorch", "jvp")):
                    raise
                raise RuntimeError(
                    "`estimator=jvp()` needs a forward-mode derivative of every operation "
                    f"({str(error).splitlines()[0]}): use estimator='exact' or "
                    "gpkit.random_difference()"
                ) from error
            return value, tangent


@dataclass(frozen=True, eq=False)
class Along:
    """J v ``[G, m]``, and the directions v ``[G, n]``."""

    tangent: Tensor
    vs: list[Tensor]

    def scaled(self, scale: Tensor | float) -> Along:
        """Return the same for scale·y."""
        return Along(widened(self.tangent) * scale, self.vs)
