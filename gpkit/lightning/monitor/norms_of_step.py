"""The norms of a step: read from the parameters, or of a loss that is differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.compat import unscales_in_its_step
from gpkit.autodiff.numerics import widened
from gpkit.lightning.compat import scale_of, scaler_of
from gpkit.lightning.monitor.groups import by_group, by_layer
from gpkit.lightning.monitor.views import View
from gpkit.lightning.norms import entries, lengths, sample_norms, together
from gpkit.lightning.recording import Histograms


class StepNorms:
    """Norms of gradients, and their way into the log.

    Args:
        weights: "total", "group", "layer", or None for no norms of weights.
        histograms: collects norms, and writes entries of gradients.
    """

    def __init__(self, weights: str | None, histograms: Histograms) -> None:
        self.weights = weights
        self.histograms = histograms
        self._read: dict[Tensor, Tensor] = {}  # of the parameters' gradients, in this step
        self._drawn: set[int] = set()  # optimisers whose gradients have histograms in this epoch

    def read(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Read the gradients of an optimiser's parameters."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = {p: p.grad for p in parameters if p.requires_grad}
        scale = _scale(trainer, module.device) if unscales_in_its_step(optimizer) else 1.0
        self._read.update(lengths(grads, scale))
        first = id(optimizer) not in self._drawn  # in this epoch
        if self.weights == "layer" and first and self.histograms.due(trainer):
            self._drawn.add(id(optimizer))
            for name, own in by_layer(module):
                parts = [entries(g) / scale for g in map(grads.get, own) if g is not None]
                if parts:
                    label = f"grad/weight/{name}/histogram"
                    self.histograms.write(trainer, label, torch.cat(parts))

    def log_read(self, trainer: Any, module: Any) -> None:
        """Log, and forget, the norms of the gradients that were read."""
        if self._read:
            self._log_weights(trainer, module, self._read, "grad_norm")
            self._read.clear()

    def end_epoch(self, trainer: Any) -> None:
        """Write the histograms of a training epoch."""
        self._drawn.clear()
        self.histograms.write_collected(trainer, "grad_norm/")

    def of_loss(
        self,
        trainer: Any,
        module: Any,
        loss: Tensor,
        views: Sequence[View],
        prefix: str,
        *,
        validating: bool,
        log: bool,
    ) -> None:
        """Differentiate a loss in inputs and activations, at validation in the weights as well.

        Args:
            trainer: of the run.
            module: the LightningModule.
            loss: one number.
            views: the inputs and activations.
            prefix: of the names in the log.
            validating: whether it is the loss of a validation, whose graph is not needed again.
            log: whether the norms are logged.
        """
        xs = [view.tensor for view in views if view.tensor is not None]
        wanted = validating and self.weights is not None
        weights = [p for p in module.parameters() if p.requires_grad] if wanted else []
        scale = _scale(trainer, loss.device)
        with torch.autocast(loss.device.type, enabled=False):
            grads = torch.autograd.grad(
                widened(loss) * scale,
                [*xs, *weights],
                retain_graph=not validating,
                allow_unused=True,
            )
        if not log:
            return
        for view, x, grad in zip(views, xs, grads[: len(xs)], strict=True):
            norms = sample_norms(grad, x) / scale
            name = f"{prefix}/{view.label}"
            module.log(name, norms.mean(), sync_dist=True, batch_size=len(x))
            self.histograms.collect(trainer, name, norms)
        found = dict(zip(weights, grads[len(xs) :], strict=True))
        self._log_weights(trainer, module, lengths(found, scale), prefix, sync_dist=True)

    def _log_weights(
        self, trainer: Any, module: Any, norms: Mapping[Tensor, Tensor], prefix: str, **options: Any
    ) -> None:
        """Log the norm of all, and of each group or layer."""
        named = [("", list(norms))]
        if self.weights == "group":
            named += by_group(trainer.optimizers)
        elif self.weights == "layer":
            named += by_layer(module)
        for name, members in named:
            parts = [norms[p] for p in members if p in norms]
            if parts:
                label = f"{prefix}/weight/{name}".rstrip("/")
                module.log(label, together(parts), batch_size=1, **options)


def _scale(trainer: Any, device: torch.device) -> Tensor | float:
    """Return the scale of the gradient scaler, without waiting for the device."""
    scale = scale_of(scaler_of(trainer), device)
    return 1.0 if scale is None else scale
