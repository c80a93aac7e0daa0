"""Gradient norms of one step, read from the parameters or taken of the loss, and their log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.compat import unscales_in_its_step
from gpkit.autodiff.derivatives import unhooked
from gpkit.autodiff.numerics import widened
from gpkit.lightning.compat import scale_of, scaler_of
from gpkit.lightning.monitor.groups import by_group, by_layer
from gpkit.lightning.monitor.tensors import WatchedTensor
from gpkit.lightning.norms import flat_entries, gradient_norms, sample_norms, total_norm
from gpkit.lightning.recording import Histograms


class StepNorms:
    """Computes gradient norms and logs them.

    Args:
        weights: which norms of the weights to log: "total", "group", "layer", or None.
        histograms: writes histograms of the norms, and of the entries of gradients.
    """

    def __init__(self, weights: str | None, histograms: Histograms) -> None:
        self.weights = weights
        self.histograms = histograms
        self._norms: dict[Tensor, Tensor] = {}  # by parameter, in this step
        self._written: set[int] = set()  # ids of optimisers with histograms in this epoch

    def read_gradients(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Take the norms of ``.grad`` of an optimiser's parameters, unscaled."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = {p: p.grad for p in parameters if p.requires_grad}
        scale = _scale(trainer, module.device) if unscales_in_its_step(optimizer) else 1.0
        self._norms.update(gradient_norms(grads, scale))
        first = id(optimizer) not in self._written  # in this epoch
        if self.weights == "layer" and first and self.histograms.due(trainer):
            self._written.add(id(optimizer))
            for name, own in by_layer(module):
                parts = [flat_entries(g) / scale for g in map(grads.get, own) if g is not None]
                if parts:
                    label = f"grad/weight/{name}/histogram"
                    self.histograms.write(trainer, label, torch.cat(parts))

    def log_gradients(self, trainer: Any, module: Any) -> None:
        """Log the norms that `read_gradients` has taken since the last call."""
        if self._norms:
            self._log_weights(trainer, module, self._norms, "grad_norm")
            self._norms.clear()

    def end_epoch(self, trainer: Any) -> None:
        """Write the histograms of a training epoch."""
        self._written.clear()
        self.histograms.write_collected(trainer, "grad_norm/")

    def log_loss(
        self,
        trainer: Any,
        module: Any,
        loss: Tensor,
        watched: Sequence[WatchedTensor],
        prefix: str,
        *,
        validating: bool,
        log: bool,
    ) -> None:
        """Differentiate a loss in inputs and activations, and log the norms.

        At validation it is differentiated in the weights as well, and its graph is freed.

        Args:
            trainer: the trainer of the run.
            module: the LightningModule.
            loss: one number.
            watched: the inputs and activations.
            prefix: prefix of the names in the log.
            validating: whether this is the loss of a validation step.
            log: whether to log; if not, the loss is only differentiated, as a check.
        """
        xs = [item.tensor for item in watched if item.tensor is not None]
        wanted = validating and self.weights is not None
        weights = [p for p in module.parameters() if p.requires_grad] if wanted else []
        scale = _scale(trainer, loss.device)
        with torch.autocast(loss.device.type, enabled=False), unhooked(weights):
            grads = torch.autograd.grad(
                widened(loss) * scale,
                [*xs, *weights],
                retain_graph=not validating,
                allow_unused=True,
            )
        if not log:
            return
        for item, x, grad in zip(watched, xs, grads[: len(xs)], strict=True):
            norms = sample_norms(grad, x) / scale
            name = f"{prefix}/{item.label}"
            module.log(name, norms.mean(), sync_dist=True, batch_size=len(x))
            self.histograms.collect(trainer, name, norms)
        found = dict(zip(weights, grads[len(xs) :], strict=True))
        self._log_weights(trainer, module, gradient_norms(found, scale), prefix, sync_dist=True)

    def _log_weights(
        self, trainer: Any, module: Any, norms: Mapping[Tensor, Tensor], prefix: str, **options: Any
    ) -> None:
        """Log the norm over all parameters, and over each group or layer."""
        named = [("", list(norms))]
        if self.weights == "group":
            named += by_group(trainer.optimizers)
        elif self.weights == "layer":
            named += by_layer(module)
        for name, parameters in named:
            parts = [norms[p] for p in parameters if p in norms]
            if parts:
                label = f"{prefix}/weight/{name}".rstrip("/")
                module.log(label, total_norm(parts), batch_size=1, **options)


def _scale(trainer: Any, device: torch.device) -> Tensor | float:
    """Return the scale of the gradient scaler; 1 without one."""
    scale = scale_of(scaler_of(trainer), device)
    return 1.0 if scale is None else scale
