"""Run a validation step with gradients on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gpkit.autodiff.compat import buffers_of, tree_map_only
from gpkit.lightning.compat import metric_state
from gpkit.lightning.refusals import MONITOR_REFUSAL, refuse
from gpkit.lightning.watch.replay import loss_of


@contextmanager
def gradients_on(module: nn.Module, arguments: Any) -> Iterator[Any]:
    """Leave inference mode and ``no_grad`` within the block.

    Outside of inference mode, inference tensors can neither be differentiated nor written to. Those
    in the arguments, in the module's buffers and in the states of its metrics are replaced by
    copies.

    Args:
        module: the module that will be called.
        arguments: its arguments, a nested structure of tensors.

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


@contextmanager
def logged_losses(module: Any) -> Iterator[list[Tensor]]:
    """Collect the losses that a module logs within the block: one number each, with a graph.

    Args:
        module: the module.

    Yields:
        The list, which is filled in the block.
    """
    found: list[Tensor] = []
    log = module.log

    def note(name: str, value: Any, *args: Any, **kw: Any) -> None:
        one = isinstance(value, Tensor) and value.requires_grad and value.numel() == 1
        if one and "loss" in name:
            found.append(value)
        log(name, value, *args, **kw)

    before = vars(module).get("log")
    module.log = note
    try:
        yield found
    finally:
        if before is None:
            del module.log
        else:
            module.log = before


def validation_loss(output: Any, logged: Sequence[Tensor] = ()) -> Tensor:
    """Return the loss in the output of a validation step, or the one that it logged.

    Args:
        output: what ``validation_step`` returned.
        logged: the losses that it logged, which count if it returned none and they are one.

    Returns:
        The loss, one number with a graph.

    Raises:
        RefusalError: if there is no loss, or it has no graph.
    """
    loss = loss_of(output)
    if loss is None and len(logged) == 1:
        loss = logged[0].reshape(())
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        found = "has no graph" if isinstance(loss, Tensor) else f"is {loss!r}"
        if loss is None and len(logged) > 1:
            found += f", and it logs {len(logged)}"
        line = (
            f"the loss that validation_step returns {found}: return it, as a tensor or as the "
            "'loss' of a dict, or leave out validation=True"
        )
        refuse(MONITOR_REFUSAL, [line])
    assert loss is not None
    return loss
