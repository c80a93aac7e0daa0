"""Dropout in a forward pass that a penalty runs itself, in a compiled loss.

Such a pass draws from a seed of its own. A graph has none, so what dropout multiplies by is drawn
outside of it, by the same function from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.autodiff.tracing.compat import traceable


@dataclass(frozen=True)
class Noise:
    """What one dropout multiplies its input by.

    Args:
        dropout: the function.
        p: the probability of a zero.
        like: the input, without its values.
    """

    dropout: Callable[..., Tensor]
    p: float
    like: Tensor

    def anew(self, device: torch.device) -> Tensor:
        """Draw it from the present random state: zeros, and else 1 / (1 - p)."""
        like = self.like
        ones = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        return self.dropout(ones.fill_(1.0), self.p, True)


class noisy(TorchFunctionMode):
    """A context, around a penalty's own forward pass, that records its dropout or replaces it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function; of a dropout, take the numbers that were drawn, or note it."""
        kwargs = kwargs or {}
        if func not in DROPOUTS:
            return traceable(func)(*args, **kwargs)
        x, p, training, inplace = DROPOUTS[func](*args, **kwargs)
        if inplace or not training or p in (0, 1):
            return func(*args, **kwargs)
        if TRACES:
            return x * TRACES[-1].noise.next(x.shape)
        if RECORDS and RECORDS[-1].calls and RECORDS[-1].calls[-1].noise:
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            RECORDS[-1].calls[-1].noise[-1].append(Noise(func, p, like))
        return func(*args, **kwargs)


def _read(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool, bool]:
    return input, p, training, inplace


def _read_op(input: Tensor, p: float, train: bool) -> tuple[Tensor, float, bool, bool]:
    return input, p, train, False


DROPOUTS: dict[Any, Any] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _read),
    torch.dropout: _read_op,
}
