"""Penalties for anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpkit import checks
from gpkit.lightning.callback.findings import REFUSAL_TITLE, findings_before_fit, may_shard
from gpkit.lightning.callback.step import PenalisedStep
from gpkit.lightning.compat import Callback, state_key
from gpkit.lightning.refusals import refuse
from gpkit.lightning.watch.wrapping import wrap
from gpkit.sums import Penalties, as_sum


class GradientPenaltyCallback(Callback):
    r"""Add gradient penalties to the loss of a LightningModule that knows nothing of them.

    .. math:: L_\text{total} = L + \sum_p P_p

    with L what ``training_step`` returns, as a tensor or as the "loss" of a dict. Training is as if
    the sum had been returned: under gradient clipping, accumulation, any precision, data
    parallelism, LBFGS. Penalties may be

    - in the weights, those of the module or of the submodule ``module=...``;
    - in the inputs, of what the submodule ``module=...`` (None: the module's own forward) is given
      as its first tensor, ``[B, *S]``. ``of="loss"`` takes L for the mean of the samples' losses
      and rescales it by B, so that the weight does not depend on the batch size; ``of="output"``
      is what the submodule gives;
    - of or in a named activation of it.

    What each costs is what it costs in a loop of one's own. Penalties that evaluate the function
    again, by finite differences say, run ``training_step`` again on the same batch, with the same
    random numbers; it then logs nothing, and metrics and batch statistics stay as they were, but
    what it does beside that is done again. The exact ones run a compiled module uncompiled, which
    has no double backward; finite differences in the weights run it compiled.

    A weight penalty's ``scope`` says which gradients are averaged before the norm is taken: the
    micro-batch's ("batch"), those of all micro-batches of the optimiser step ("accumulated"), those
    of all ranks as well ("global"), or none: each sample's own ("sample", for which the step is run
    on every sample alone). The first micro-batches of an accumulated step are run again at its end.

    Parts under non-reentrant checkpointing are penalised as others, but for finite differences in
    their inputs and other points, whose forward could not be made again; it is refused.

    It logs, on the steps that the trainer logs, ``train/loss_total``, and for each penalty
    ``penalty/<name>`` (as it enters the loss), ``penalty/<name>/weight`` and
    ``penalty/<name>/norm`` (the mean norm). Its state is in the checkpoints. Before the first
    optimiser step it is checked that each penalty acts, and all that is found against it is told
    at once.

    Args:
        penalty: a penalty, a list of them, several by name, or a `gpkit.sum`.
        module: the name of the submodule whose weights, inputs or activations are meant, as in
            ``module.named_modules()``; None is the module itself.
        manual_backward: under manual optimisation, which of the ``manual_backward`` calls of a
            training step gets the penalties, from 0. The loss that it is given stays as it is.

    Raises:
        TypeError: if ``penalty`` is none of these.
        ValueError: at the start of a fit, of all that keeps a penalty from acting.

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
    ) -> None:
        self.penalties = as_sum(penalty)
        if module is not None and not isinstance(module, str):
            raise TypeError(
                f"`module=...` must be the name of a submodule, as 'backbone'; got {module!r}"
            )
        self.module = module
        self._key = state_key(self, module=module)  # Lightning asks at every hook
        self._is_set_up = False
        self.manual_backward = (
            manual_backward
            if manual_backward is None
            else checks.integer("manual_backward=...", manual_backward, 0)
        )
        self._unwrap: list[Callable[[], None]] = []  # each undoes a step of `on_fit_start`

    @property
    def state_key(self) -> str:
        """Return the name of the state in a checkpoint, from the set-up for a trainer on.

        Before, it is this callback's alone: else no trainer could be made with two for one
        submodule, and it would say why in terms of checkpoints. The fit says it, with all the rest.
        """
        return self._key if self._is_set_up else f"{self._key}#{id(self)}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the name that the state has in checkpoints."""
        self._is_set_up = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the penalties around the module's ``training_step``."""
        self._give_back()
        found = findings_before_fit(trainer, pl_module)
        if may_shard(trainer.strategy) or not pl_module.automatic_optimization:
            refuse(
                REFUSAL_TITLE, found
            )  # a training step would show no more, or step the optimisers
        step = PenalisedStep(trainer, pl_module, self.penalties, self.module, found)
        if pl_module.automatic_optimization:
            self._unwrap = [step.remove, wrap(pl_module, "training_step", step)]
            return

        def backward(call: Any, *args: Any, **kwargs: Any) -> None:
            step.backward(call, self.manual_backward or 0, *args, **kwargs)

        self._unwrap = [
            step.remove,
            wrap(pl_module, "training_step", step.manual),
            wrap(pl_module, "manual_backward", backward, innermost=True),
        ]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self._give_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was: after an exception nothing else is called."""
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the penalties: plain numbers."""
        return {"penalties": self.penalties.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from states; a penalty that has none begins at its beginning."""
        self.penalties.load_state_dict(state_dict["penalties"])

    def _give_back(self) -> None:
        while self._unwrap:
            self._unwrap.pop()()

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process without what is of this one."""
        return {**self.__dict__, "_unwrap": []}
