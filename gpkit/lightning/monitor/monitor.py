"""`GradientNormMonitor`: gradient norms of any LightningModule in the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from gpkit import checks
from gpkit.autodiff.compat import tree_map_only
from gpkit.findings.monitor import findings_of_monitor
from gpkit.findings.trainer import findings_of_manual_backward
from gpkit.lightning.compat import Callback, last_of_step, logs_now
from gpkit.lightning.monitor.step_norms import StepNorms
from gpkit.lightning.monitor.tensors import WatchedTensor, WatchedTensors
from gpkit.lightning.monitor.validation import gradients_on, logged_losses, validation_loss
from gpkit.lightning.recording import Histograms
from gpkit.lightning.refusals import MONITOR_REFUSAL, refuse
from gpkit.lightning.watch.replay import loss_of
from gpkit.lightning.watch.wrapping import wrap

WEIGHTS = ("total", "group", "layer")


class GradientNormMonitor(Callback):
    r"""Logs gradient norms of any LightningModule.

    Training stays bit for bit the same. (With ``inputs`` or ``activations``, a compiled module runs
    uncompiled on some steps, which rounds differently.) On the steps that the trainer logs
    (``log_every_n_steps``) it logs:

    - ``grad_norm/weight``: the norm of the gradient that the optimiser is about to apply,
      :math:`\lVert g\rVert_2` over all parameters. It is read from ``.grad`` after accumulation,
      averaging over ranks and unscaling, before gradient clipping, and takes no backward pass. It
      is the gradient of all that is trained on, penalties included. With ``weights="group"`` there
      is also one norm for each parameter group, ``grad_norm/weight/group_0`` (or the group's own
      "name"; ``optimizer_1/group_0`` with several optimisers), and with ``weights="layer"`` one for
      each submodule that owns parameters, ``grad_norm/weight/backbone.0``. A parameter without a
      gradient counts as zero. If an optimiser steps several times in one training step, the last
      step is logged.
    - ``grad_norm/input``: the mean over samples of :math:`\lVert\partial\ell_i/\partial
      x_i\rVert_2`, where x is the first tensor ``[B, *S]`` in the input of a submodule. With
      several submodules it is ``grad_norm/input/<name>``. ``grad_norm/activation/<name>`` is the
      same for the output of a submodule. The loss L is the one that ``training_step`` itself
      returns, without the penalties of a `GradientPenaltyCallback`, in whichever order the two
      callbacks are. L is taken for the mean of the samples' losses, so the norm of a sample is
      :math:`\lVert B\,\partial L/\partial x_i\rVert_2` with B the length of x. If the samples
      depend on each other, as in batch norm, this is what is logged. These norms take one more
      backward pass on the logged steps, in which compiled modules run uncompiled. With gradient
      accumulation they are those of the last micro-batch.

    With ``validation=True`` the same norms of the loss that ``validation_step`` returns (as a
    tensor, or as the "loss" of a dict; or the one loss that it logs) are logged as
    ``val/grad_norm/...``; for the weights it is the norm of each batch's gradient, averaged over
    batches. It is off by default, because the step then runs with gradients on: it needs memory for
    a graph, must ``detach()`` what it keeps, and cannot call ``numpy()`` on tensors that
    require grad.

    TensorBoard gets histograms in every n-th epoch. ``grad_norm/input/histogram`` (and likewise
    ``val/...``) holds the norms of the samples on the logged steps. With ``weights="layer"``,
    ``grad/weight/<name>/histogram`` holds the entries of each submodule's gradient on the first
    logged step of the epoch. Histograms leave out values that are not finite. Scalars are logged as
    they are: with a gradient scaler they are infinite or NaN on the steps that it skips. Under data
    parallelism the means are over all ranks, and the histograms are those of rank 0.

    Args:
        weights: "total", "group" (and the total), "layer" (and the total), or None for no norms of
            weights.
        inputs: the name of a submodule whose input is watched, as in ``module.named_modules()``, or
            several names; "" is the module itself.
        activations: the name of a submodule whose output is watched, or several names.
        validation: whether to log norms at validation as well.
        histogram_every_n_epochs: the epochs 0, n, 2n, ... have histograms; 0 means that none has.
        manual_backward: under manual optimisation, the index from 0 of the ``manual_backward`` call
            in a training step whose loss is differentiated in inputs and activations.
        call: the index from 0 of the call of a watched submodule, if a step calls it several times.

    Raises:
        TypeError: if ``inputs`` or ``activations`` are not names.
        ValueError: if another argument is out of range; and, as a ``RefusalError`` at the start or
            the first step of a fit, if a norm cannot be logged.

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
        call: int | None = None,
    ) -> None:
        self.weights = None if weights is None else checks.choice("weights=...", weights, WEIGHTS)
        self.inputs = _names("inputs", () if inputs is None else inputs)
        self.activations = _names("activations", activations)
        self.validation = validation
        self.histogram_every_n_epochs = checks.integer(
            "histogram_every_n_epochs=...", histogram_every_n_epochs, 0
        )
        self.manual_backward = checks.optional_integer("manual_backward=...", manual_backward, 0)
        self.call = checks.optional_integer("call=...", call, 0)
        self._unwrap: dict[
            str, Callable[[], None]
        ] = {}  # functions that undo a wrapping, by method
        self._reset()

    def _reset(self) -> None:
        """Forget the state of the last fit."""
        self._norms = StepNorms(self.weights, Histograms(self.histogram_every_n_epochs))
        self._last_batch = -1
        self._unchecked = True  # no training step has been differentiated yet
        self._manual: list[WatchedTensor] | None = None  # in a step with manual optimisation
        self._backward_calls = 0

    @property
    def _watches(self) -> bool:
        """Whether inputs or activations are watched, for which the loss is differentiated."""
        return bool(self.inputs or self.activations)

    # A fit.

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the training step if inputs or activations are watched."""
        self._restore()
        self._reset()
        which, watches = self.manual_backward, self._watches
        found = list(findings_of_monitor(trainer, pl_module, self, own=watches))
        found += findings_of_manual_backward(pl_module, which, needed=watches, what="has the loss")
        refuse(MONITOR_REFUSAL, found)
        if not self._watches:
            return
        if pl_module.automatic_optimization:
            self._wrap_step(trainer, pl_module, "training_step", self._training_step, True)
        else:
            self._wrap_step(trainer, pl_module, "training_step", self._manual_step, True)
            backward = partial(self._manual_backward, trainer, pl_module)
            self._unwrap["manual_backward"] = wrap(pl_module, "manual_backward", backward)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Take the norms of the gradients of the optimiser's parameters."""
        if self.weights is not None and logs_now(trainer):
            self._norms.read_gradients(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norms of the gradients."""
        self._norms.log_gradients(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the histograms of the epoch."""
        self._norms.end_epoch(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the module."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the module. After an exception Lightning does not call ``on_fit_end``."""
        self._restore()

    # Validation.

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the validation step if ``validation=True``."""
        if self.validation and (self._watches or self.weights):
            refuse(MONITOR_REFUSAL, findings_of_monitor(trainer, pl_module, self, own=True))
            self._wrap_step(trainer, pl_module, "validation_step", self._validation_step, False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the histograms of the validation, and restore the validation step."""
        self._norms.histograms.write_collected(trainer, "val/")
        self._restore("validation_step")

    # Wrappers of the module's methods: `call` is the method, or the next inner wrapper.

    def _training_step(
        self, tensors: WatchedTensors, trainer: Any, module: Any, call: Any, *args: Any, **kw: Any
    ) -> Any:
        if not self._differentiates_now(trainer):
            return call(*args, **kw)
        with tensors as watched:
            output = call(*args, **kw)
        loss = loss_of(output)
        if loss is not None and loss.requires_grad:
            self._log_loss(trainer, module, loss, watched)
        return output

    def _manual_step(
        self, tensors: WatchedTensors, trainer: Any, module: Any, call: Any, *args: Any, **kw: Any
    ) -> Any:
        if not self._differentiates_now(trainer):
            return call(*args, **kw)
        self._backward_calls = 0
        with tensors as self._manual:
            try:
                return call(*args, **kw)
            finally:
                self._manual = None

    def _manual_backward(
        self, trainer: Any, module: Any, call: Any, loss: Tensor, *args: Any, **kw: Any
    ) -> None:
        if self._manual is not None and self._backward_calls == self.manual_backward:
            self._log_loss(trainer, module, loss, self._manual)
        self._backward_calls += 1
        call(loss, *args, **kw)
        for item in self._manual or ():
            item.capture.end_backward()

    def _validation_step(
        self, tensors: WatchedTensors, trainer: Any, module: Any, call: Any, *args: Any, **kw: Any
    ) -> Any:
        with gradients_on(module, (args, kw)) as (args, kw):
            with tensors as watched, logged_losses(module) as logged:
                output = call(*args, **kw)
            loss = validation_loss(output, logged)
            self._log_loss(trainer, module, loss, watched, "val/grad_norm")
        return tree_map_only(Tensor, Tensor.detach, output)

    # The norms.

    def _differentiates_now(self, trainer: Any) -> bool:
        """Whether to differentiate this training step: the first, as a check, and logged ones."""
        batch, last = trainer.fit_loop.total_batch_idx, self._last_batch
        self._last_batch = batch
        # The step may be rerun on the same batch, by LBFGS or for a penalty.
        return batch != last and (self._unchecked or _logs_batch(trainer))

    def _log_loss(
        self,
        trainer: Any,
        module: Any,
        loss: Tensor,
        watched: list[WatchedTensor],
        prefix: str = "grad_norm",
    ) -> None:
        """Log the norms of a loss; at validation those of the weights as well."""
        validating = prefix != "grad_norm"
        step = "validation_step" if validating else "training_step"
        refuse(MONITOR_REFUSAL, (f for item in watched for f in item.findings(step)))
        log = validating or _logs_batch(trainer)
        self._norms.log_loss(trainer, module, loss, watched, prefix, validating=validating, log=log)
        self._unchecked = self._unchecked and validating

    def _wrap_step(
        self, trainer: Any, module: Any, name: str, wrapper: Any, innermost: bool
    ) -> None:
        """Wrap a step by a method of this class, which gets the watched tensors."""
        tensors = WatchedTensors(module, self.inputs, self.activations, self.call)
        bound = partial(wrapper, tensors, trainer, module)
        self._unwrap[name] = wrap(module, name, bound, innermost=innermost)
        self._unwrap[f"{name}'s hooks"] = tensors.remove

    def _restore(self, step: str = "") -> None:
        """Remove the wrappers and hooks of one step, or of all."""
        for name in [name for name in self._unwrap if name.startswith(step)]:
            self._unwrap.pop(name)()


def _names(title: str, given: str | Iterable[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"`{title}=...` must be names of submodules, such as 'backbone'; got {name!r}"
            )
    return tuple(dict.fromkeys(names))


def _logs_batch(trainer: Any) -> bool:
    """Whether the trainer logs this batch: the last micro-batch of a step that is logged."""
    return logs_now(trainer) and last_of_step(trainer)
