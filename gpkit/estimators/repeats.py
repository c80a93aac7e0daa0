"""Whether a function that is run again gives the same value."""

from __future__ import annotations

import torch
from torch import Tensor

from gpkit.autodiff.numerics import spacing

SAME = "gives the same value when it is run again"  # what is remembered about a function


def require_same(first: Tensor, again: Tensor) -> None:
    """Refuse values that differ by more than rounding.

    Raises:
        RuntimeError: if they do.
    """
    eps = min(spacing(first) * 256, 0.05)  # other kernels round otherwise
    a, b = first.detach(), again.detach()
    if a.shape == b.shape and torch.allclose(a, b, rtol=eps, atol=eps, equal_nan=True):
        return
    values = f"{a.double().mean().item():.7g}, then {b.double().mean().item():.7g}"
    raise RuntimeError(
        f"the function gives another value when it is run again ({values}), so a penalty that runs "
        "it again is of another function: it draws random numbers that gpkit does not find, or "
        "keeps a state. Draw the numbers, or read the state, before the function, and let it use "
        "them; or use estimator='exact', which does not run it again"
    )
