"""Gradients inside of inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gpkit.autodiff.compat import buffers_of, tree_map_only
from gpkit.lightning.compat import metric_state


@contextmanager
def gradients_on(module: nn.Module, arguments: Any) -> Iterator[Any]:
    """Leave inference mode and no_grad for a while.

    Tensors made in inference mode can neither be differentiated nor written to outside of it: those
    among the arguments are copied, and the module's buffers and metrics go on with copies.

    Args:
        module: what will be called.
        arguments: what it will be called with, tensors in any structure.

    Yields:
        The arguments to call it with.
    """
    with torch.inference_mode(False), torch.enable_grad():
        for owner in module.modules():
            buffers_of(owner).update({k: _usable(t) for k, t in buffers_of(owner).items()})
            if isinstance(owner, Metric):
                states = metric_state(owner, caches=False)
                owner.__dict__.update(tree_map_only(Tensor, _usable, states))
        yield tree_map_only(Tensor, _usable, arguments)


def _usable(tensor: Any) -> Any:
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
