"""What a derivative is compared with, entry by entry, before the norm is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit.autodiff.numerics import widened


@dataclass(frozen=True, eq=False)
class Compared:
    r"""A target g and a metric A: the norm is that of A ∘ (D f - g).

    A derivative has R rows, as in `gpkit.autodiff.derivatives.derivative_rows`: one for the
    gradient of one output. Rows, and gradients in the weights, are lists of one part for each
    variable.

    Args:
        targets: g, ``[G, R, n]`` for each variable; None is 0.
        metrics: A, constants, ``[G or 1, R or 1, n or 1]`` for each variable; None is 1.

    >>> compared = Compared((torch.tensor([[[1.0, 1.0]]]),), (torch.tensor([[[1.0, 3.0]]]),))
    >>> compared.row([torch.tensor([[5.0, 2.0]])])
    [tensor([[4., 3.]])]
    """

    targets: tuple[Tensor, ...] | None = None
    metrics: tuple[Tensor, ...] | None = None

    def rows(self, rows: Iterable[Sequence[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
        """Yield A ∘ (row - g) for all rows of a derivative, in their order."""
        for r, row in enumerate(rows):
            yield tuple(self.row(row, r))

    def row(self, row: Sequence[Tensor], r: int = 0) -> list[Tensor]:
        """Return A ∘ (row - g) for row r, in float32 or better."""
        if self.targets is not None:
            pairs = zip(row, self.targets, strict=True)
            row = [widened(part) - _row(g, r, part) for part, g in pairs]
        return self.times(row, r)

    def times(self, row: Sequence[Tensor], r: int = 0) -> list[Tensor]:
        """Return A ∘ row."""
        if self.metrics is None:
            return list(row)
        pairs = zip(row, self.metrics, strict=True)
        return [widened(part) * _row(a, r, part) for part, a in pairs]

    def directed(self, vs: Sequence[Tensor]) -> list[Tensor]:
        """Return A ∘ v for directions that all outputs share.

        Raises:
            ValueError: if the metric differs between the outputs.
        """
        rows = max((a.shape[1] for a in self.metrics or ()), default=1)
        if rows > 1:
            raise ValueError(
                "all outputs are moved along the same directions, so metric= must be the same for "
                f"all of them, [B, *S]; got one for each of {rows}: use estimator='exact'"
            )
        return self.times(vs)

    def along(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return ⟨g, v⟩ ``[G]`` for vectors ``[G, n]`` and all rows: ``[G, R]`` if R > 1."""
        if self.targets is None:
            return vectors[0].new_zeros(len(vectors[0]))
        pairs = zip(self.targets, vectors, strict=True)
        found = torch.stack([(g * v.unsqueeze(1)).sum(2) for g, v in pairs]).sum(0)
        return found.squeeze(1)

    def pulled(
        self, n2: Tensor, ascent: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]
    ) -> Tensor:
        """Return n² of a gradient in weights with its derivative in g too: -2n ⟨A ∘ v, g⟩.

        Args:
            n2: n², with its derivatives in everything but g.
            ascent: n, v and A ∘ v, with v the direction of steepest ascent.
        """
        if not self.trained:
            return n2
        n, _, directions = ascent
        along = self.along([d.reshape(1, -1) for d in directions])
        return n2 - 2 * n * (along - along.detach())

    def projected(self, v: Tensor) -> Compared:
        """Return what the rows' sum with weights v ``[G, R]`` is compared with.

        Raises:
            ValueError: if the metric differs between rows, so that a sum of rows cannot be scaled.
        """
        if v.shape[1] > 1 and any(a.shape[1] > 1 for a in self.metrics or ()):
            raise ValueError(
                "projections add up the outputs, so metric= must be the same for all of them, "
                f"[B, *S]; got one for each of {v.shape[1]}: use estimator='exact'"
            )
        if self.targets is None:
            return self
        g = tuple((t * v.to(t.dtype).unsqueeze(2)).sum(1, keepdim=True) for t in self.targets)
        return Compared(g, self.metrics)

    def scaled(self, scale: Tensor | float) -> Compared:
        """Return the same for scale·y."""
        if self.targets is None:
            return self
        return Compared(tuple(g * scale for g in self.targets), self.metrics)

    def detached(self) -> Compared:
        """Return the same without graphs."""
        if self.targets is None:
            return self
        return Compared(tuple(g.detach() for g in self.targets), self.metrics)

    @property
    def trained(self) -> bool:
        """Whether the target has a graph."""
        return any(g.requires_grad for g in self.targets or ())


def _row(x: Tensor, r: int, part: Tensor) -> Tensor:
    """Return row r of ``[G, R, n]``, in the shape of a part, or such that it broadcasts to it."""
    x = x[:, r if x.shape[1] > 1 else 0]
    return x.reshape(part.shape) if x.numel() == part.numel() else x
