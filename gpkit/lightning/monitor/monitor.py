"""Gradient norms in the log of anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from gpkit import checks
from gpkit.autodiff.compat import tree_map_only
from gpkit.lightning.compat import Callback, last_of_step, logs_now
from gpkit.lightning.monitor.findings import (
    CANNOT,
    of_backward,
    of_module,
    of_names,
    of_strategy,
    validation_loss,
)
from gpkit.lightning.monitor.inference import gradients_on
from gpkit.lightning.monitor.norms_of_step import StepNorms
from gpkit.lightning.monitor.views import View, Views
from gpkit.lightning.recording import Histograms
from gpkit.lightning.refusals import refuse
from gpkit.lightning.watch import wrapping
from gpkit.lightning.watch.replay import loss_of

WEIGHTS = ("total", "group", "layer")


class GradientNormMonitor(Callback):
    r"""Log gradient norms of a LightningModule that knows nothing of them.

    Training stays bit for bit the same (but for the rounding of compiled modules, where inputs or
    activations are asked for). On the steps that the trainer logs (``log_every_n_steps``):

    - ``grad_norm/weight``, the norm of the gradient that the optimiser is about to apply:
      accumulated, averaged over ranks, unscaled, before clipping, and with all that was added to
      the loss, penalties included. It is read from the parameters and takes no pass of its own. By
      request there is one for each parameter group of the optimiser,
      ``grad_norm/weight/group_0`` (or the group's own "name"; ``optimizer_1/group_0`` where there
      are several), or for each submodule with parameters of its own,
      ``grad_norm/weight/backbone.0``. A parameter without a gradient counts as zero. Of several
      steps of an optimiser in one training step, the last is logged.
    - ``grad_norm/input``, the mean over samples of :math:`\lVert\partial\ell_i/\partial
      x_i\rVert`, x the first tensor ``[B, *S]`` that a submodule is given; of several submodules
      ``grad_norm/input/<name>``; and ``grad_norm/activation/<name>``, likewise of a submodule's
      output. They are of the loss L that ``training_step`` itself returns, without what a
      `GradientPenaltyCallback` adds, in whichever order the callbacks are. L is taken for the mean
      of the samples' losses and rescaled by B, the length of x. Where samples meet, as in batch
      norm, it is :math:`\lVert B\,\partial L/\partial x_i\rVert`. They take one backward pass
      more on these steps, on which compiled modules run uncompiled, and those of the last
      micro-batch are logged.

    At validation, if asked for, ``val/grad_norm/...``: all of these of the loss that
    ``validation_step`` returns (as a tensor, or as the "loss" of a dict), the weights' norm being
    that of each batch's gradient, averaged over batches. It is not the default, because the step
    must be run with gradients on: it then needs memory for a graph, must ``detach()`` what it
    keeps, and may not call ``numpy()`` on what requires grad.

    TensorBoard gets histograms in every n-th epoch: of the samples' norms on the logged steps, as
    ``grad_norm/input/histogram``; and with ``weights="layer"`` of the entries of each submodule's
    gradient on the first logged step, as ``grad/weight/<name>/histogram``. Entries that are not
    finite are left out of histograms. Norms are logged as they are: with a gradient scaler they are
    infinite, or NaN, on the steps that it skips. Under data parallelism the means are over all
    ranks, the histograms of the first rank.

    Args:
        weights: "total", "group" (and the total), "layer" (and the total), or None.
        inputs: the name of a submodule whose input is meant, as in ``module.named_modules()``, or
            several; "" is the module itself.
        activations: names of submodules whose outputs are meant.
        validation: whether to log norms at validation as well.
        histogram_every_n_epochs: how often histograms are written; 0 is never.
        manual_backward: under manual optimisation, which of the ``manual_backward`` calls of a
            training step has the loss for inputs and activations, from 0.

    Raises:
        TypeError: if ``inputs`` or ``activations`` are not names.
        ValueError: of another choice; and at the start of a fit, or at its first step, of all that
            keeps a norm from being there.

    >>> import gpkit, torch
    >>> import pytorch_lightning as pl
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> trainer = pl.Trainer(
    ...     max_steps=2, callbacks=[gpkit.GradientNormMonitor(inputs="layer")], logger=False,
    ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ...     limit_val_batches=0, accelerator="cpu", log_every_n_steps=1,
    ... )
    >>> trainer.fit(BoringModel())
    >>> sorted(name for name in trainer.callback_metrics if name.startswith("grad_norm/"))
    ['grad_norm/input', 'grad_norm/weight']
    """

    def __init__(
        self,
        weights: str | None = "total",
        *,
        inputs: str | Iterable[str] | None = None,
        activations: str | Iterable[str] = (),
        validation: bool = False,
        histogram_every_n_epochs: int = 5,
        manual_backward: int | None = None,
    ) -> None:
        self.weights = None if weights is None else checks.choice("weights=...", weights, WEIGHTS)
        self.inputs = _names("inputs", () if inputs is None else inputs)
        self.activations = _names("activations", activations)
        self.validation = validation
        self.histogram_every_n_epochs = checks.integer(
            "histogram_every_n_epochs=...", histogram_every_n_epochs, 0
        )
        self.manual_backward = (
            manual_backward
            if manual_backward is None
            else checks.integer("manual_backward=...", manual_backward, 0)
        )
        self._layers: dict[str, Callable[[], None]] = {}  # how to take each off again
        self._start_over()

    def _start_over(self) -> None:
        """Forget a fit."""
        self._norms = StepNorms(self.weights, Histograms(self.histogram_every_n_epochs))
        self._batch = -1  # the last one seen
        self._first = True
        self._views: list[View] | None = None  # of a step with manual optimisation
        self._calls = 0

    @property
    def _looks(self) -> bool:
        """Whether steps are looked into."""
        return bool(self.inputs or self.activations)

    # A fit.

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look into the training step, where inputs or activations are asked for."""
        self._take_off()
        self._start_over()
        found = list(self._found(trainer, pl_module, self._looks))
        found += of_backward(pl_module, self.manual_backward, differentiates=self._looks)
        refuse(CANNOT, found)
        if self._looks:
            automatic = pl_module.automatic_optimization
            step = self._training_step if automatic else self._manual_step
            self._look_into(trainer, pl_module, "training_step", step, inside=True)
            if not automatic:
                backward = partial(self._manual_backward, trainer, pl_module)
                self._put_on(pl_module, "manual_backward", backward)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Read the gradients of an optimiser's parameters."""
        if self.weights is None or not logs_now(trainer):
            return
        self._norms.read(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norms of the gradients that the optimisers were about to apply."""
        self._norms.log_read(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the histograms that the epoch has collected."""
        self._norms.end_epoch(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self._take_off()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was: after an exception nothing else is called."""
        self._take_off()

    # A validation.

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Look into the validation step."""
        if self.validation and (self._looks or self.weights):
            refuse(CANNOT, self._found(trainer, pl_module, differentiates=True))
            self._look_into(trainer, pl_module, "validation_step", self._validation_step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the histograms, and give the validation step back."""
        self._norms.histograms.write_collected(trainer, "val/")
        self._take_off("validation_step")

    # The layers around the module's methods.

    def _training_step(
        self, watch: Views, trainer: Any, module: Any, call: Any, *args: Any, **kw: Any
    ) -> Any:
        if not self._acts(trainer):
            return call(*args, **kw)
        with watch as views:
            output = call(*args, **kw)
        loss = loss_of(output)
        if loss is not None and loss.requires_grad:
            self._look(trainer, module, loss, views)
        return output

    def _manual_step(
        self, watch: Views, trainer: Any, module: Any, call: Any, *args: Any, **kw: Any
    ) -> Any:
        if not self._acts(trainer):
            return call(*args, **kw)
        self._calls = 0
        with watch as self._views:
            try:
                return call(*args, **kw)
            finally:
                self._views = None

    def _manual_backward(
        self, trainer: Any, module: Any, call: Any, loss: Tensor, *args: Any, **kw: Any
    ) -> None:
        if self._views is not None and self._calls == self.manual_backward:
            self._look(trainer, module, loss, self._views)
        self._calls += 1
        call(loss, *args, **kw)

    def _validation_step(
        self, watch: Views, trainer: Any, module: Any, call: Any, *args: Any, **kw: Any
    ) -> Any:
        with gradients_on(module, (args, kw)) as (args, kw):
            with watch as views:
                output = call(*args, **kw)
            self._look(trainer, module, validation_loss(output), views, "val/grad_norm")
        return tree_map_only(Tensor, Tensor.detach, output)

    # The norms.

    def _acts(self, trainer: Any) -> bool:
        """Return whether a training step is looked into: the first is, to see that it can be."""
        batch, last = trainer.fit_loop.total_batch_idx, self._batch
        self._batch = batch
        if batch == last:  # made again, by LBFGS or for a penalty
            return False
        return self._first or _logs_batch(trainer)

    def _look(
        self, trainer: Any, module: Any, loss: Tensor, views: list[View], prefix: str = "grad_norm"
    ) -> None:
        """Log the norms of a loss; at validation those of the weights as well."""
        validating = prefix != "grad_norm"
        step = "validation_step" if validating else "training_step"
        once = validating or module.automatic_optimization
        refuse(CANNOT, (f for view in views for f in view.findings(step, once=once)))
        log = validating or _logs_batch(trainer)
        self._norms.of_loss(trainer, module, loss, views, prefix, validating=validating, log=log)
        self._first = self._first and validating

    def _found(self, trainer: Any, module: Any, differentiates: bool) -> Iterator[str]:
        reads = self.weights is not None
        yield from of_module(module)
        yield from of_strategy(trainer.strategy, reads=reads, differentiates=differentiates)
        yield from of_names(module, [*self.inputs, *self.activations])

    def _look_into(
        self, trainer: Any, module: Any, name: str, layer: Any, *, inside: bool = False
    ) -> None:
        """Put a layer around a step, that has the views of it."""
        watch = Views(module, self.inputs, self.activations)
        self._put_on(module, name, partial(layer, watch, trainer, module), inside=inside)
        self._layers[f"{name}'s hooks"] = watch.remove

    def _put_on(self, module: Any, name: str, layer: Any, *, inside: bool = False) -> None:
        self._layers[name] = wrapping.add(module, name, layer, inside=inside)

    def _take_off(self, step: str = "") -> None:
        for name in [name for name in self._layers if name.startswith(step)]:
            self._layers.pop(name)()


def _names(title: str, given: str | Iterable[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"`{title}=...` must be names of submodules, as 'backbone'; got {name!r}"
            )
    return tuple(dict.fromkeys(names))


def _logs_batch(trainer: Any) -> bool:
    """Whether the trainer logs this batch: of a step's micro-batches the last."""
    return logs_now(trainer) and last_of_step(trainer)
