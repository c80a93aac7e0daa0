"""The trace of the second derivative: the Laplacian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import MAX_PASSES, as_rows, gradients
from gpkit.autodiff.numerics import widened
from gpkit.autodiff.random import Source, has_ranks
from gpkit.autodiff.sharding.gathering import require_no_hooks
from gpkit.estimators.base import Begun, Estimator, Target, require_inputs
from gpkit.estimators.projection import projection
from gpkit.estimators.taylor import OnPath, value_of


@dataclass(frozen=True)
class trace(Estimator):
    r"""The squared trace of the Hessian, the Laplacian, instead of its Frobenius norm.

    .. math:: n^2 = (\mathrm{tr} \, \nabla^2 f)^2, \quad \text{exactly, or as} \quad
              \frac{2}{N (N - 1)} \sum_{j<k} (v_j^\top H v_j) (v_k^\top H v_k)

    for ``order=2``. The exact trace takes one backward pass for each of the d entries of a sample,
    after one for the gradient. With N independent draws of random signs v it takes N; a product of
    two different draws has no bias, unlike the square of one. It may be negative, so forms that
    take a root need the exact trace. For several outputs the squares are added.

    With ``jets=True`` the exact trace is Σ_i ∂²f/∂x_i², by Taylor mode: the function runs once on
    series x + t e_i for each of the d entries, and one ordinary backward pass trains it. It needs
    the function, made of smooth operations, see `gpkit.directional_derivative`.

    Args:
        n: N >= 2, the number of draws; None for the exact trace.
        jets: whether the exact trace is taken by Taylor mode.

    Raises:
        ValueError: if ``n`` < 2, or ``n`` and ``jets`` are both given; in the call, if the exact
            trace would take more than ten thousand passes.

    Source: Hutchinson (1989), doi:10.1080/03610918908812806.

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(order=2, estimator=trace(), form="norm")
    >>> penalty(lambda x: x[:, 0] ** 2 - 3 * x[:, 1] ** 2, torch.ones(4, 2)).item()  # |2 - 6|
    4.0
    >>> penalty = gpkit.GradientPenalty(order=2, estimator=trace(jets=True), form="norm")
    >>> penalty(lambda x: x[:, 0] ** 2 - 3 * x[:, 1] ** 2, torch.ones(4, 2)).item()
    4.0
    """

    n: int | None = None
    jets: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        checks.optional_integer("trace(n=...)", self.n, 2)
        if self.jets and self.n is not None:
            raise ValueError(f"`trace(jets=True)` is exact and draws nothing; got n={self.n}")
        if self.jets:
            flags = {"reuses_graph": False, "on_jets": True, "elementary": True}
            for name, flag in {**flags, "begun": self.first_run}.items():
                object.__setattr__(self, name, flag)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but second derivatives in inputs.

        Raises:
            ValueError: if the order is another.
        """
        require_inputs(self, norm, batched)
        if order != 2:
            raise ValueError(
                f"`estimator=trace()` is the trace of a second derivative; got order={order}: use "
                "order=2"
            )

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better.

        Args:
            target: the output and the inputs.
            order: 2.
            norm: "l2".
            rng: the random numbers of the draws.

        Returns:
            n² ``[G]``.
        """
        if self.jets:
            return torch.stack(list(self.by_jets(target))).sum(0).square().sum(1)
        total = torch.zeros(len(target.xs[0]), device=target.device)
        for y in target.y.unbind(1):
            grads = [as_rows(g, True) for g in gradients(y.sum(), target.xs)]
            if self.n is None:
                total = total + self.exactly(grads, target.xs).square()
                continue
            draws = torch.stack([self.drawn(grads, target.xs, rng) for _ in range(self.n)])
            pairs = draws.sum(0).square() - draws.square().sum(0)  # of two different draws
            total = total + pairs / (self.n * (self.n - 1))
        return total

    def first_run(
        self,
        function: Callable[..., list[Tensor]],
        xs: tuple[Tensor, ...],
        order: int,
        rng: Source,
        step: int,
        metrics: tuple[Tensor, ...] | None,
    ) -> Begun:
        """Run the function along the first entry; it gives the value too."""
        require_passes(xs)
        found = function(*along(xs, 0, 0))
        return Begun(list(map(value_of, found)), list(map(OnPath, found)), xs)

    def by_jets(self, target: Target) -> Iterator[Tensor]:
        """Yield ∂²f/∂x_i² ``[G, m]`` for each entry of a sample.

        Raises:
            ValueError: if there is no function, or it takes too many passes.
        """
        from gpkit.autodiff.taylor.directional import last_derivative

        if target.evaluate is None:
            raise ValueError(
                "`estimator=trace(jets=True)` needs a callable, to run it on Taylor series; got a "
                "tensor: use penalty(f, x), or trace()"
            )
        require_passes(target.xs)
        if has_ranks():
            require_no_hooks(target.y, "`estimator=trace(jets=True)`")
        for i, x in enumerate(target.xs):
            for entry in range(x[0].numel()):
                if (i, entry) == (0, 0) and isinstance(target.series, OnPath):
                    y = target.series.y
                else:
                    y = target.evaluate(*along(target.xs, i, entry))
                yield widened(last_derivative(y, 2))

    def exactly(self, grads: Sequence[Tensor], xs: tuple[Tensor, ...]) -> Tensor:
        """Return tr H ``[G]``, from gradients ``[G, n]``.

        Raises:
            ValueError: if it takes too many backward passes.
        """
        require_passes(xs)
        parts = []
        for g, x in zip(grads, xs, strict=True):
            for i, column in enumerate(g.unbind(1)):
                (row,) = gradients(column.sum(), (x,))
                parts.append(widened(as_rows(row, True)[:, i]))
        return torch.stack(parts).sum(0)

    def drawn(self, grads: Sequence[Tensor], xs: tuple[Tensor, ...], rng: Source) -> Tensor:
        """Return vᵀHv ``[G]`` for random signs v."""
        vs = projection(1).draw(tuple(grads), rng)
        along = torch.stack([(g * v).sum() for g, v in zip(grads, vs, strict=True)]).sum()
        rows = [as_rows(h, True) for h in gradients(along, xs)]
        parts = [(widened(h) * v).sum(1) for h, v in zip(rows, vs, strict=True)]
        return torch.stack(parts).sum(0)


def require_passes(xs: tuple[Tensor, ...]) -> None:
    """Refuse samples with too many entries.

    Raises:
        ValueError: if the exact trace takes more than `MAX_PASSES` passes.
    """
    count = sum(x[0].numel() for x in xs)
    if count > MAX_PASSES:
        raise ValueError(
            f"the exact trace takes one pass for each of {count} entries of a sample, over the "
            f"limit of {MAX_PASSES}: use gpkit.trace(2)"
        )


def along(xs: tuple[Tensor, ...], i: int, entry: int) -> tuple[Tensor, ...]:
    """Return x + t e, with e the unit vector of one entry of the i-th variable, as series in t."""
    from gpkit.autodiff.taylor.directional import paths

    vs = [torch.zeros_like(as_rows(x.detach(), True)) for x in xs]
    vs[i][:, entry] = 1
    return paths(xs, tuple(v.reshape(x.shape) for v, x in zip(vs, xs, strict=True)), 2)
