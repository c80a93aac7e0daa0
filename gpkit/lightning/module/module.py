"""`PenalizedModule`: a LightningModule that trains any net on a loss and gradient penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.activations import captured
from gpkit.autodiff.isolation import double_backward, isolated
from gpkit.autodiff.state import start_of
from gpkit.compiling.entry import compiled
from gpkit.compiling.named import begin, keeping, terms_of
from gpkit.estimators.window import summarised
from gpkit.findings.located import locating
from gpkit.formula import Terms
from gpkit.lightning.batches import Batch, Keys, entries, unpack
from gpkit.lightning.compat import logs_now, scale_of, scaler_of, trainer_of
from gpkit.lightning.module.alone import fits, is_alone, penalised
from gpkit.lightning.module.forward import ForwardPass, ForwardRunner, require_fit
from gpkit.lightning.module.logged import TOTAL, StepLog, log_norms_of
from gpkit.lightning.module.metrics import as_metrics, prediction
from gpkit.lightning.recording import EVALUATION, Histograms, LatestStep, penalty_scalars
from gpkit.lightning.refusals import require_functions
from gpkit.losses import LossFunction, as_loss, logits, per_sample
from gpkit.needs import Needs, needs_of
from gpkit.sums import Penalties, as_sum, examined

AllTerms = dict[str, Terms | None]


class PenalizedModule(pl.LightningModule):
    r"""Trains any net on a loss and gradient penalties, with batches ``(x, y)`` or dicts.

    .. math:: L_\text{total} = \frac1s \Big(L + \sum_p P_p\Big),
              \quad L = \mathrm{loss}(\mathrm{net}(x), y)

    P_p is a penalty with its weight λ_p(t), see `gpkit.GradientPenalty`. s is 1, or max(1, λ_p(t))
    with a `rescaled` weight (of several, the greatest).

    Penalties in the weights, and penalties in the inputs at the data, reuse the graph of the
    training forward, unless their estimator evaluates the net itself (finite differences, Taylor
    mode). Penalties at other points run the net at these points. For points that need fake samples,
    such as interpolates, the fake sample of x_i is x_{i-1}, since there is no generator. Several
    points per sample, as in a mixture, share the target of the sample. Penalties on environments
    take batches ``(x, y, env)`` with integers env ``[B]``; without env, the two halves of the batch
    are the environments.

    x may be a tuple or dict of the net's arguments. Of a mapping, a dataclass or a named tuple, as
    ``{"input_ids": ..., "attention_mask": ..., "labels": ...}``, the labels are y, and the rest
    goes to the net by keyword. A loss of torch gets the ``logits`` of an output that has them.

    It logs ``train/loss`` (L, without penalties), ``train/loss_total``, and for each penalty
    ``penalty/<name>`` (weighted, as it enters the loss), ``penalty/<name>/weight``, and where it
    acts ``penalty/<name>/norm`` (the mean norm): on the steps that the trainer logs, and on the
    last of an epoch and of the fit. On the steps that the trainer logs it also logs
    ``grad_norm/weight``, the norm ‖∂L/∂θ‖ without penalties, and ``grad_norm/input``, the mean
    over samples of ‖∂ℓ_i/∂x_i‖. At validation and test it logs ``<stage>/loss`` (without
    penalties), the metrics as ``<stage>/<metric>``, ``<stage>/grad_norm/weight`` and
    ``<stage>/grad_norm/input``. TensorBoard gets the histograms ``penalty/<name>/norm/histogram``
    and ``grad_norm/input/histogram``.

    Args:
        net: any module. Its output is the first argument of the loss.
        loss: ``(output, y) -> loss``, a module or a function. With a ``reduction``, or an output
            ``[B]``, penalties on the loss get the loss of each sample. A loss that returns only one
            number is multiplied by B for them, which is exact if it is a mean over samples.
        penalty: a penalty, a list of penalties, a dict of them by name, a `gpkit.sum`, or None.
        optimizer: parameters -> optimiser, such as ``functools.partial(torch.optim.SGD, lr=0.1)``.
            None is Adam with a learning rate of 1e-3.
        scheduler: optimiser -> learning-rate scheduler, stepped every epoch; or None.
        metrics: torchmetrics by name, updated with the output and y at validation and test. None is
            ``acc`` for a cross-entropy, and ``mae`` for a loss on values.
        gradient_norms: whether to log gradient norms of the loss, which take backward passes.
        histogram_every_n_epochs: the epochs 0, n, 2n, ... have histograms; 0 means that none has.
        compile: whether to compile the loss and its penalties as one graph, from the second step
            on, see `gpkit.compile`. It takes tens of seconds, so it pays for long runs. What cannot
            be compiled, or is slower, runs as it is: a warning or a line of the log says why.
        inputs: the entries of a batch that are the net's inputs: names, passed by keyword, or
            positions. None is all but the target and what a penalty has in ``given=``. Penalties
            "in the input" are in the first that is a floating-point tensor, and those with
            ``wrt=gpkit.inputs("a", "b")`` in these entries.
        target: the entry that is y. None is "labels", "label", "targets", "target" or "y".
        doctor: whether each penalty is checked at its first step: it must train the net, by a right
            gradient. An error names the modules that are at fault.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if two penalties have the same name, or ``histogram_every_n_epochs`` is
            negative.
        RuntimeError: if this version of torch cannot compile gradients.

    ``PenalizedModule.load_from_checkpoint(path, net=..., loss=...)`` needs both: a checkpoint has
    the weights and the states of the penalties. `gpkit.load` makes the net of one of ``train.py``.

    >>> import gpkit, torch
    >>> net = torch.nn.Linear(2, 1)
    >>> module = gpkit.PenalizedModule(
    ...     net, loss=torch.nn.MSELoss(), penalty=gpkit.input_grad_norm(weight=0.5)
    ... )
    >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
    >>> closed = net(x).square().mean() + 0.5 * (2 * net(x) * net.weight).square().sum(1).mean()
    >>> torch.allclose(module.penalized_loss((x, y)), closed)
    True
    """

    def __init__(
        self,
        net: nn.Module,
        loss: LossFunction,
        penalty: Penalties | None = None,
        *,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        metrics: Any = None,
        gradient_norms: bool = True,
        histogram_every_n_epochs: int = 5,
        compile: bool = False,
        inputs: Keys = None,
        target: Keys = None,
        doctor: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"`net=...` must be a torch.nn.Module; got a {type(net).__name__}")
        self.net = net
        self.loss = as_loss(loss)
        self.per_sample_loss = per_sample(loss)
        self.penalties = as_sum(penalty)
        # The penalties that have not acted yet: an error of one names modules.
        self._unseen = set(self.penalties) if examined(self.penalties, doctor) else set()
        self.needs = {name: needs_of(part) for name, part in self.penalties.items()}
        require_fit(self.needs)
        self.is_alone = is_alone(self.needs)
        require_functions(optimizer=optimizer, scheduler=scheduler)
        self.make_optimizer, self.make_scheduler = optimizer or torch.optim.Adam, scheduler
        self.val_metrics = as_metrics(metrics, loss).clone()
        self.test_metrics = as_metrics(metrics, loss).clone()
        self.gradient_norms = gradient_norms
        self.histograms = Histograms(
            checks.integer("histogram_every_n_epochs=...", histogram_every_n_epochs, 0)
        )
        self.compiled_loss = compiled(self._computed, self.penalties) if compile else None
        self.inputs, self.target = inputs, target
        self.latest_step, self.step_log = LatestStep({}, {}), StepLog()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the net."""
        return self.net(*args, **kwargs)

    def penalized_loss(self, batch: Any) -> Tensor:
        """Return the total loss of a batch, penalties included, and count a step.

        Args:
            batch: ``(x, y)`` or ``(x, y, env)``; or a mapping, a dataclass or a named tuple.

        Returns:
            The total, one number.
        """
        return self._total(batch, log_norms=False)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the total loss, and log it and its parts."""
        log_norms = self.gradient_norms and logs_now(self.trainer)
        total, forward, terms = self._total(batch, log_norms=log_norms)
        scalars = {"train/loss": forward.loss.detach(), **penalty_scalars(self.penalties, terms)}
        self.latest_step = LatestStep({**scalars, TOTAL: total.detach()}, terms)
        self.step_log.add(self, self.latest_step.scalars)
        self.histograms.collect_norms(self.trainer, terms)
        if log_norms:
            log_norms_of(self, forward, "grad_norm", collect=True)
        return total

    def on_train_epoch_start(self) -> None:
        """Forget what was logged before."""
        self.step_log.clear()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log a step after which the fit stops, such as one that a callback has ended."""
        if self.trainer.should_stop:
            self.step_log.write(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss, the metrics and the gradient norms of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss, the metrics and the gradient norms of a batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the output of the net for a batch as in training, or for ``x``."""
        if isinstance(batch, Tensor):
            return self(batch)
        if isinstance(batch, (list, tuple)) and len(batch) == 1:
            return self(batch[0])
        read = self._read(batch)
        return self(*read.args, **read.kwargs)

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the parameters that require grad, and its scheduler."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def on_train_epoch_end(self) -> None:
        """Write the histograms of the epoch."""
        self.histograms.write_collected(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of each penalty, as plain numbers."""
        checkpoint["gpkit_penalties"] = self.penalties.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the state of each penalty. A penalty that is not in it keeps its own."""
        self.penalties.load_state_dict(checkpoint.get("gpkit_penalties", {}))

    def _total(self, batch: Any, *, log_norms: bool) -> tuple[Tensor, ForwardPass, AllTerms]:
        """Return the total loss, the forward pass, and the terms of the penalties."""
        read, needs, compiled = self._read(batch), self.needs, self.compiled_loss
        given = {name: entries(own.given, batch) for name, own in needs.items() if own.given}
        options: dict[str, Any] = {"scale": scale_of(scaler_of(trainer_of(self)), read.x.device)}
        step = self._optimizer_step()
        if compiled is None or compiled.obstacle or not torch.is_grad_enabled():
            new = {n for n in self._unseen if self.penalties[n].acts_at(step)}
            self._unseen -= new
            alone = self.is_alone and not log_norms and options["scale"] is None and fits(read)
            with locating(self.net) if new else nullcontext():
                if alone:
                    losses = self.loss, self.per_sample_loss
                    return penalised(self.penalties, needs, self.net, losses, read, step)
                options["step"] = step
                forward, terms = self._act(read, needs, given, options, log_norms=log_norms)
        else:
            begin(self.penalties, step)
            loss, reduced = compiled(read, given, options)
            forward = self._with_norms(read, loss) if log_norms else ForwardPass(read.x, None, loss)
            terms = terms_of(self.penalties, compiled, reduced)
        with keeping(self.penalties, compiled):
            total = self.penalties.total(forward.loss, terms, self.net.parameters)
        assert total is not None
        return total, forward, terms

    def _read(self, batch: Any) -> Batch:
        keys = {key for own in self.needs.values() for _, key in own.given if not callable(key)}
        return unpack(batch, self.net, self.inputs, self.target, keys)

    def _act(
        self,
        batch: Batch,
        needs: dict[str, Needs],
        given: dict[str, Any],
        options: dict[str, Any],
        *,
        log_norms: bool = False,
    ) -> tuple[ForwardPass, AllTerms]:
        """Run the training forward, and evaluate each penalty on it."""
        x, y, env = batch.x, batch.y, batch.environments()
        every, runner = list(needs.values()), self._runner(needs, batch)
        named = [a for n in every if not n.moves for a in n.activations]
        alone = len(every) == 1 and every[0].loss_at_two_points and not every[0].pooled
        alone = alone and not (log_norms or every[0].measures) and torch.is_grad_enabled()
        start = start_of((self.net, self.loss), x.device) if alone else None
        order = max([0, *[n.order for n in every]])
        with double_backward(order) if order else nullcontext():
            with captured(self.net, dict.fromkeys(named)) as activations:
                forward = runner(
                    x,
                    y,
                    graph_in_x=log_norms or any(n.input_graph for n in every),
                    per_sample=log_norms or any(n.sample_losses for n in every),
                )
            forward = replace(forward, activations=activations, start=start)
            if alone:  # one backward pass gives the gradient of the loss to both
                forward = replace(forward, loss=summarised(forward.loss, options["scale"]))
            terms = {
                name: runner.act(p, needs[name], forward, y, env, **options, **given.get(name, {}))
                for name, p in self.penalties.items()
            }
        return forward, terms

    def _computed(
        self, batch: Batch, given: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the loss, and the value of each penalty without its weight: what is compiled."""
        forward, terms = self._act(batch, self.needs, given, options)
        return forward.loss, {n: None if own is None else own.reduced for n, own in terms.items()}

    def _with_norms(self, batch: Batch, loss: Tensor) -> ForwardPass:
        """Return a forward pass for gradient norms: a compiled graph allows one backward pass."""
        with isolated(self.net, 0, batch.x.device):
            again = self._runner({}, batch)(batch.x, batch.y, graph_in_x=True, per_sample=True)
        return replace(again, loss=loss)

    def _runner(self, needs: dict[str, Needs], batch: Batch | None = None) -> ForwardRunner:
        features = any(own.features for own in needs.values())
        layers = [self.penalties[name] for name, own in needs.items() if own.layers]
        loss = self.loss, self.per_sample_loss
        names = dict.fromkeys(name for own in needs.values() for name in own.names)
        return ForwardRunner(self.net, *loss, features, layers, batch, tuple(names))

    def _optimizer_step(self) -> int | None:
        """Return the optimiser step; None without a trainer: then the penalties count the steps."""
        trainer = trainer_of(self)
        return None if trainer is None else trainer.global_step

    def _evaluate(self, batch: Any, stage: str) -> None:
        # Norms need a graph: leave inference mode, and clone its tensors.
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradient_norms):
            read = self._read(batch).map(Tensor.clone)
            x, y, norms = read.x, read.y, self.gradient_norms
            forward = self._runner({}, read)(x, y, graph_in_x=norms, per_sample=norms)
            if norms:
                log_norms_of(self, forward, f"{stage}/grad_norm", collect=False)
            self.log(f"{stage}/loss", forward.loss.detach(), batch_size=len(x), **EVALUATION)
            metrics = self.val_metrics if stage == "val" else self.test_metrics
            metrics.update(prediction(logits(forward.output), y), y)
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric, batch_size=len(x), **EVALUATION)
