"""The scale of a gradient scaler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaler_of(trainer: Any) -> Any:
    """Return the gradient scaler of float16 training, or None; ``trainer`` may be None."""
    return getattr(getattr(trainer, "precision_plugin", None), "scaler", None)


def scale_of(scaler: Any, device: torch.device) -> Tensor | None:
    """Return the scale that a scaler has now, without waiting for the device; None for none.

    Args:
        scaler: of gradients, or None.
        device: where the loss is.
    """
    return None if scaler is None else scaler.scale(torch.ones((), device=device))
