"""A training step run again, without a trace in logs and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gpkit.autodiff.compat import tree_leaves, tree_map_only, write_count
from gpkit.autodiff.random import RandomState
from gpkit.lightning.compat import metric_state
from gpkit.lightning.watch import wrapping

Step = Callable[..., Any]


@dataclass
class Made:
    """A training step that was made, as far as it takes to make it again.

    Args:
        step: the module's own training step.
        args: what it was called with.
        kwargs: likewise, by name.
        state: of the random numbers before it; empty where it is not made again.
    """

    step: Step
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: RandomState = ()

    def versions(self) -> list[int]:
        """Return how often each tensor of the batch was written to, where torch counts it."""
        tensors = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        return [write_count(t) for t in tensors if not t.is_inference()]


def loss_of(output: Any) -> Tensor | None:
    """Return the loss of what a training step gave: a tensor, or the "loss" of a mapping."""
    if output is None or isinstance(output, Tensor):
        return output
    return output.get("loss") if isinstance(output, Mapping) else output


def with_loss_of(output: Any, loss: Tensor) -> Any:
    """Return what a training step gave, with another loss in it."""
    return loss if isinstance(output, Tensor) else {**output, "loss": loss}


class Traces:
    """What a training step leaves behind, its logs and the state of its metrics, held back at will.

    Args:
        module: the LightningModule. Its ``log`` and ``log_dict`` pass through here until `remove`,
            as the same functions all the time: a compiled step is not compiled anew.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.silent = False
        self._layers = [wrapping.add(module, name, self._log) for name in ("log", "log_dict")]

    def remove(self) -> None:
        """Give the module its own functions back."""
        for off in self._layers:
            off()

    def _log(self, log: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if not self.silent:
            log(*args, **kwargs)

    @contextmanager
    def none(self) -> Iterator[None]:
        """Let a step leave no traces."""
        metrics = [m for m in self.module.modules() if isinstance(m, Metric)]
        states = [_state(m) for m in metrics]
        self.silent = True
        try:
            yield
        finally:
            self.silent = False
            for metric, state in zip(metrics, states, strict=True):
                metric.__dict__.update(state)


def _state(metric: Metric) -> dict[str, Any]:
    """Return what an update of a metric changes, as copies."""
    return {
        k: v.clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v
        for k, v in metric_state(metric).items()
    }


def losses_of(module: nn.Module, made: Made, traces: Traces) -> Tensor:
    """Return the loss of each sample, ``[B]``, of a step made on every sample alone.

    Args:
        module: the LightningModule, named for the isolation of what is called.
        made: the step. Its batch is the first argument.
        traces: of the module.

    Returns:
        The losses.
    """
    named = {**made.kwargs, **({"batch": made.args[0]} if made.args else {})}
    losses = []
    with traces.none():
        for sample in samples_of(named["batch"]):
            if made.args:
                output = made.step(sample, *made.args[1:], **made.kwargs)
            else:
                output = made.step(**{**made.kwargs, "batch": sample})
            losses.append(loss_of(output))
    return torch.stack([loss for loss in losses if loss is not None])


def samples_of(batch: Any) -> Iterator[Any]:
    """Yield a batch's samples, each as a batch of one.

    Args:
        batch: tensors ``[B, ...]`` in any structure. A tensor of another length is in every sample.

    Yields:
        The batch with ``t[i : i + 1]`` for every such tensor t.

    Raises:
        TypeError: if there is no tensor in it.
    """
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    sizes = [len(t) for t in tensors if t.ndim]
    if not sizes:
        raise TypeError(
            f"scope='sample' cuts the batch into its samples: tensors [B, ...]; got a "
            f"{type(batch).__name__} without one: use scope='batch'"
        )
    for i in range(sizes[0]):

        def cut(t: Tensor, i: int = i) -> Tensor:
            return t[i : i + 1] if t.ndim and len(t) == sizes[0] else t

        yield tree_map_only(Tensor, cut, batch)
