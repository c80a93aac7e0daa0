"""The scale of a gradient scaler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_of(trainer: Any, device: torch.device) -> Tensor | None:
    """Return the scale that float16 training has, without waiting for the device; None for none.

    Args:
        trainer: of the run, or None.
        device: where the loss is.
    """
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=device))
