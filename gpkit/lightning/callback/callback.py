"""`GradientPenaltyCallback`: gradient penalties for any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gpkit import checks
from gpkit.findings.trainer import findings_before_fit, may_shard
from gpkit.lightning.callback.plan import Losses
from gpkit.lightning.callback.step import PenalizedStep
from gpkit.lightning.compat import Callback, state_key
from gpkit.lightning.refusals import CALLBACK_REFUSAL, refuse
from gpkit.lightning.watch.wrapping import wrap
from gpkit.needs import Needs, needs_of
from gpkit.sums import Penalties, as_sum, examined


class GradientPenaltyCallback(Callback):
    r"""Adds gradient penalties to the loss of any LightningModule.

    .. math:: L_\text{total} = \frac1s \Big(L + \sum_p P_p\Big)

    L is the loss that ``training_step`` returns, as a tensor or as the "loss" of a dict. P_p is a
    penalty with its weight λ_p(t), see `gpkit.GradientPenalty`. s is 1, or max(1, λ_p(t)) with a
    `rescaled` weight (of several, the greatest). Training is the same as if ``training_step``
    returned the total itself, also with gradient clipping, gradient accumulation, mixed precision,
    data parallelism and LBFGS. A penalty can be

    - in the weights of the module, or of the submodule ``module=...``;
    - in the input of that submodule (with None, of the module's own ``forward``): the first tensor
      that it is called with, ``[B, *S]``. ``of="loss"`` takes L for the mean of the samples' losses
      and multiplies it by B, so the weight need not change with the batch size; ``of="output"``
      differentiates the output of the submodule;
    - in inputs by name, ``wrt=gpkit.inputs("a", "b")``: what the submodule gets by keyword, under
      these names in its ``forward``, or in a dict; else entries of the batch. With
      ``module=None``, entries of the batch first;
    - of, or in, a named activation of it.

    A penalty costs as much as in a training loop written by hand. Penalties that evaluate the
    function again, such as finite differences, rerun ``training_step`` on the same batch with the
    same random numbers. A rerun logs nothing, and metric states and batch norm statistics stay as
    they were; any other side effect of the step happens again. Exact penalties run a compiled
    module uncompiled, because ``torch.compile`` has no double backward; finite differences in the
    weights run it compiled.

    The ``scope`` of a penalty in the weights says which gradients are averaged before the norm is
    taken: those of the micro-batch ("batch"), of all micro-batches of the optimiser step
    ("accumulated"), of all ranks as well ("global"), or none ("sample": each sample has its own
    gradient, and the step runs once per sample). For "accumulated" and "global" the earlier
    micro-batches are rerun at the end of the optimiser step.

    Submodules under non-reentrant checkpointing work as well. Only a penalty that replaces their
    input or an activation, by finite differences or at other points, is refused: the rerun of
    checkpointing in the backward pass would compute something else.

    On the steps that the trainer logs, the callback logs ``train/loss_total``, and for each penalty
    ``penalty/<name>`` (weighted, as it enters the loss), ``penalty/<name>/weight``, and where it
    acts ``penalty/<name>/norm`` (the mean norm). The penalties' state is saved in checkpoints.

    Before its first backward pass each penalty is checked: it must depend on a trained parameter.
    All problems are reported in one error.

    Args:
        penalty: a penalty, a list of penalties, a dict of them by name, or a `gpkit.sum`.
        module: the name of the submodule whose weights, inputs or activations are meant, as in
            ``module.named_modules()``; None is the module itself.
        manual_backward: under manual optimisation, the index from 0 of the ``manual_backward`` call
            in a training step whose loss gets the penalties. That loss tensor is not changed.
        call: if a training step calls the submodule several times, as a critic on real samples and
            on fakes, the index from 0 of the call whose input, output or activation is meant. The
            calls of a submodule that an activation names are counted likewise.
        losses: where a training step shows the loss of each sample ``[B]``, or of each step
            ``[B, T]``, whose mean is then that of the sample: the key of an entry of the dict that
            it returns, or a function ``(output, batch) -> losses`` of the output of the submodule.
            Penalties of ``of="loss"`` that need them, such as those with ``sample_weight`` of
            steps, differentiate them, and not B times the mean; ``scope="sample"`` in the weights
            then needs no run for each sample.
        doctor: whether each penalty is checked at its first step: it must train the net, by a right
            gradient. An error names the modules that are at fault.
        compile: whether to compile the training step with its penalties as one graph, after the
            first step of each, see `gpkit.compile`. What the step logs is kept, and logged after
            the graph has run. A step that cannot be traced, as one that updates metrics, runs as it
            is, and so does one that is slower compiled: a warning or a line of the log says why.

    Raises:
        RuntimeError: if this version of torch cannot compile gradients.
        TypeError: if ``penalty`` or ``module`` has another type.
        ValueError: if two penalties have the same name, or ``manual_backward`` or ``call`` is
            negative; and, as
            a ``RefusalError`` at the start or the first step of a fit, if a penalty cannot act.

    >>> import gpkit, torch
    >>> import pytorch_lightning as pl
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> callback = GradientPenaltyCallback(gpkit.weight_grad_norm(weight=0.1))
    >>> trainer = pl.Trainer(
    ...     max_steps=2, callbacks=[callback], logger=False, enable_checkpointing=False,
    ...     enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    ...     accelerator="cpu", log_every_n_steps=1,
    ... )
    >>> trainer.fit(BoringModel())
    >>> sorted(n for n in trainer.callback_metrics if n.startswith("penalty/"))
    ... # doctest: +NORMALIZE_WHITESPACE
    ['penalty/weight_grad_norm', 'penalty/weight_grad_norm/norm', 'penalty/weight_grad_norm/weight']
    """

    def __init__(
        self,
        penalty: Penalties,
        module: str | None = None,
        *,
        manual_backward: int | None = None,
        call: int | None = None,
        losses: Losses | None = None,
        doctor: bool = True,
        compile: bool = False,
    ) -> None:
        self.penalties = as_sum(penalty)
        self.doctor, self.compile = examined(self.penalties, doctor), compile
        if module is not None and not isinstance(module, str):
            raise TypeError(
                f"`module=...` must be the name of a submodule, such as 'backbone'; got {module!r}"
            )
        self.module = module
        self._key = state_key(self, module=module)  # kept: Lightning reads it at every hook
        self._is_set_up = False
        self.manual_backward = checks.optional_integer("manual_backward=...", manual_backward, 0)
        self.call = checks.optional_integer("call=...", call, 0)
        if losses is not None and not isinstance(losses, str) and not callable(losses):
            raise TypeError(
                "`losses=...` must be the key of an entry of what training_step returns, or a "
                f"function (output, batch) -> losses; got {losses!r}"
            )
        self.losses = losses
        self._unwrap: list[Callable[[], None]] = []  # functions that undo on_fit_start

    @property
    def state_key(self) -> str:
        """Return the key of the callback's state in a checkpoint.

        ``Trainer(...)`` refuses two callbacks with one key, with a message about checkpoints. Until
        `setup` the key is therefore unique to this instance, so that the fit can report the two
        callbacks together with everything else.
        """
        return self._key if self._is_set_up else f"{self._key}#{id(self)}"

    @property
    def needs(self) -> dict[str, Needs]:
        """What each penalty needs of a training step, by name."""
        needs = {name: needs_of(penalty) for name, penalty in self.penalties.items()}
        given = self.losses is not None
        return {name: own.with_losses() if given else own for name, own in needs.items()}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the final state key."""
        self._is_set_up = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the module's ``training_step`` so that it adds the penalties."""
        self._restore()
        found = list(findings_before_fit(trainer, pl_module))
        if may_shard(trainer.strategy) or not pl_module.automatic_optimization:
            # No training step first: sharded weights may fail in it, and manual optimisation
            # would step the optimisers. In other cases the first step adds its own findings.
            refuse(CALLBACK_REFUSAL, found)
        step = PenalizedStep(
            trainer,
            pl_module,
            self.penalties,
            self.module,
            found,
            self.call,
            self.losses,
            doctor=self.doctor,
            compile=self.compile,
        )
        if pl_module.automatic_optimization:
            self._unwrap = [step.remove, wrap(pl_module, "training_step", step)]
            return
        backward = partial(step.manual_backward, self.manual_backward or 0)
        self._unwrap = [
            step.remove,
            wrap(pl_module, "training_step", step.manual_training_step),
            wrap(pl_module, "manual_backward", backward, innermost=True),
        ]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the module."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the module. After an exception Lightning does not call ``on_fit_end``."""
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each penalty, as plain numbers."""
        return {"penalties": self.penalties.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of each penalty. A penalty that is not in it keeps its own."""
        self.penalties.load_state_dict(state_dict["penalties"])

    def _restore(self) -> None:
        while self._unwrap:
            self._unwrap.pop()()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the wrappers: they belong to the module of this process."""
        return {**self.__dict__, "_unwrap": []}
