"""Rerun a training step without side effects on logs and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gpkit.autodiff.compat import tree_leaves, tree_map_only, write_count
from gpkit.autodiff.state import Start
from gpkit.lightning.compat import metric_state
from gpkit.lightning.watch.wrapping import wrap

TrainingStep = Callable[..., Any]
Logged = tuple[str, tuple[Any, ...], dict[str, Any]]


@dataclass
class StepCall:
    """One call of ``training_step``: its arguments, and what is needed to rerun it.

    Args:
        training_step: the module's own method.
        args: its positional arguments.
        kwargs: its keyword arguments.
        start: what the call started from; None if the step is not rerun.
    """

    training_step: TrainingStep
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: Start | None = None

    @property
    def batch(self) -> Any:
        """The batch that the step was called with."""
        return self.args[0] if self.args else self.kwargs["batch"]

    def with_batch(self, batch: Any) -> StepCall:
        """Return the same call with another batch."""
        if self.args:
            return replace(self, args=(batch, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "batch": batch})

    def tensor_versions(self) -> list[int]:
        """Return the version counter of each tensor in the arguments.

        A counter that has grown shows an in-place write. Inference tensors have no counter and are
        left out.
        """
        tensors = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        return [write_count(t) for t in tensors if not t.is_inference()]


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in the output of a training step: a tensor, or the "loss" of a mapping."""
    if output is None or isinstance(output, Tensor):
        return output
    return output.get("loss") if isinstance(output, Mapping) else output


def replace_loss(output: Any, loss: Tensor) -> Any:
    """Return the output of a training step with another loss in it."""
    return loss if isinstance(output, Tensor) else {**output, "loss": loss}


class Silencer:
    """Keeps reruns of a training step silent: they log nothing and leave metric states unchanged.

    ``log`` and ``log_dict`` of the module are wrapped once, until `remove`, and not once per rerun:
    a compiled step would be compiled again for each new function.

    Args:
        module: the LightningModule.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.silent = False
        self._kept: list[Logged] | None = None
        names = ("log", "log_dict")
        self._unwrap = [wrap(module, name, partial(self._log, name)) for name in names]

    def remove(self) -> None:
        """Unwrap ``log`` and ``log_dict``."""
        for unwrap in self._unwrap:
            unwrap()

    def _log(self, name: str, log: Callable[..., None], /, *args: Any, **kwargs: Any) -> None:
        if self._kept is not None:
            args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
            self._kept.append((name, args, kwargs))
        elif not self.silent:
            log(*args, **kwargs)

    @contextmanager
    def kept(self) -> Iterator[list[Logged]]:
        """Keep log calls within the block, with tensors without graphs, to be made later.

        Yields:
            The calls: the name of the method and its arguments.
        """
        kept: list[Logged] = []
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Drop log calls within the block, and restore the metric states at its end."""
        metrics = [m for m in self.module.modules() if isinstance(m, Metric)]
        states = [_copied_state(m) for m in metrics]
        self.silent = True
        try:
            yield
        finally:
            self.silent = False
            for metric, state in zip(metrics, states, strict=True):
                metric.__dict__.update(state)


def _copied_state(metric: Metric) -> dict[str, Any]:
    """Return copies of all attributes that an update of a metric changes."""
    return {
        k: v.clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v
        for k, v in metric_state(metric).items()
    }


def per_sample_losses(module: nn.Module, call: StepCall, silencer: Silencer) -> Tensor:
    """Run a training step on each sample of its batch alone, and return the losses ``[B]``.

    Args:
        module: the LightningModule. It is an argument so that `isolated` finds its buffers.
        call: the step. Its batch is the first positional argument, or ``batch=``.
        silencer: of the module.

    Returns:
        The loss of each sample, ``[B]``.
    """
    named = {**call.kwargs, **({"batch": call.args[0]} if call.args else {})}
    losses = []
    with silencer.silenced():
        for sample in split_into_samples(named["batch"]):
            if call.args:
                output = call.training_step(sample, *call.args[1:], **call.kwargs)
            else:
                output = call.training_step(**{**call.kwargs, "batch": sample})
            losses.append(loss_of(output))
    return torch.stack([loss for loss in losses if loss is not None])


def split_into_samples(batch: Any) -> Iterator[Any]:
    """Yield each sample of a batch, as a batch of one.

    Args:
        batch: a nested structure of tensors ``[B, ...]``. B is the length of the first of them; a
            tensor with another length, or no dimension, is passed whole with every sample.

    Yields:
        The structure with ``t[i : i + 1]`` in place of every tensor ``t`` of length B.

    Raises:
        TypeError: if the batch holds no tensor with a batch dimension.
    """
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    sizes = [len(t) for t in tensors if t.ndim]
    if not sizes:
        raise TypeError(
            f"scope='sample' splits the batch into samples and needs tensors [B, ...] in it; got a "
            f"{type(batch).__name__} without any: use scope='batch'"
        )
    for i in range(sizes[0]):

        def cut(t: Tensor, i: int = i) -> Tensor:
            return t[i : i + 1] if t.ndim and len(t) == sizes[0] else t

        yield tree_map_only(Tensor, cut, batch)
