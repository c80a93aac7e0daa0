"""Any net, wrapped: a LightningModule that trains on a loss and gradient penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpkit import checks
from gpkit.autodiff.activations import captured
from gpkit.autodiff.compat import tree_map_only
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.kernels import double_backward
from gpkit.autodiff.norm_layers import elementary
from gpkit.autodiff.random import random_state
from gpkit.estimators.window import summarised
from gpkit.formula import Terms
from gpkit.lightning.batches import environments, unpack
from gpkit.lightning.compat import logs_now, scale_of, scaler_of, trainer_of
from gpkit.lightning.module.compiled import CompiledLoss
from gpkit.lightning.module.forward import Forward, Pass
from gpkit.lightning.module.losses import LossFunction, per_sample
from gpkit.lightning.module.metrics import as_metrics, prediction
from gpkit.lightning.norms import input_norms, weight_norm
from gpkit.lightning.recording import EVALUATION, Histograms, penalty_numbers
from gpkit.needs import Needs, needs_of
from gpkit.sums import Penalties, as_sum

AllTerms = dict[str, Terms | None]


class PenalizedModule(pl.LightningModule):
    """A net trained on a loss and gradient penalties, for batches ``(x, y)``.

    The trained loss is ``loss(net(x), y)`` and the sum of the penalties. Penalties in the weights,
    and those in the inputs at the data itself, reuse the graph of the training forward, unless
    their estimator evaluates the net itself (finite differences, Taylor mode). A penalty at other
    points evaluates the net there; where one asks for fakes, as interpolates do, and there is no
    generator, the fake of a sample is the sample before it in the batch; where one is at several
    points a sample, as in a mixture, they share the sample's target. A penalty on environments
    takes them from batches ``(x, y, env)``, env integers ``[B]``; where a batch has none, its two
    halves are taken for environments.

    It logs ``train/loss`` (without penalties), ``train/loss_total``, ``penalty/<name>`` (weighted,
    as it enters the loss), ``penalty/<name>/weight`` and ``penalty/<name>/norm`` (the mean norm);
    on the steps that the trainer logs, ``grad_norm/weight``, the norm ‖∇_θ L‖ of the loss without
    penalties, and ``grad_norm/input``, the mean over samples of ‖∇_x ℓ_i‖; at validation and test
    ``<stage>/loss``, the metrics and ``<stage>/grad_norm/*``; and TensorBoard histograms of the
    norms behind penalties and inputs.

    Args:
        net: any module; its output goes into the loss.
        loss: ``(output, y) -> loss``, a module or a function. Where it has a ``reduction``, or
            gives ``[B]``, penalties on the loss see each sample's own; a loss that gives only a
            mean is rescaled by B for them (exact if it is a mean over samples).
        penalty: a penalty, several by name, or None.
        optimizer: parameters -> optimiser, such as ``functools.partial(torch.optim.SGD, lr=0.1)``.
            None is Adam with a learning rate of 1e-3.
        scheduler: optimiser -> learning-rate scheduler, stepped every epoch; or None.
        metrics: torchmetrics by name, updated with the output and y at validation and test. None
            takes ``acc`` for a cross-entropy and ``mae`` for a loss on values.
        gradient_norms: whether to log gradient norms of the loss. They take one or two backward
            passes on the steps that are logged, and at validation and test.
        histogram_every_n_epochs: how often histograms are written; 0 is never.
        compile: whether the loss and its penalties are compiled, as one graph, from the second step
            on; the first shows that each penalty acts. It pays for long runs: compiling takes tens
            of seconds. Penalties must be in the weights or at the data.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if ``histogram_every_n_epochs`` is negative, or a penalty cannot be compiled.

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
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"`net=...` must be a torch.nn.Module; got a {type(net).__name__}")
        if not callable(loss):
            raise TypeError(f"`loss=...` must be a function (output, y) -> loss; got {loss!r}")
        self.net = net
        self.loss = loss
        self.per_sample_loss = per_sample(loss)
        self.penalties = as_sum(penalty)
        self.needs = {name: needs_of(part) for name, part in self.penalties.items()}
        self.make_optimizer = optimizer or torch.optim.Adam
        self.make_scheduler = scheduler
        self.val_metrics = as_metrics(metrics, loss).clone()
        self.test_metrics = as_metrics(metrics, loss).clone()
        self.gradient_norms = gradient_norms
        self.histograms = Histograms(
            checks.integer("histogram_every_n_epochs=...", histogram_every_n_epochs, 0)
        )
        self._compiled = (
            CompiledLoss(self._differentiated, self.penalties, net) if compile else None
        )
        self._first = True

    def forward(self, x: Any) -> Any:
        """Return what the net gives."""
        return self.net(x)

    def penalized_loss(self, batch: Any) -> Tensor:
        """Return the scalar that is trained on, penalties included.

        Args:
            batch: ``(x, y)``, or ``(x, y, env)``.

        Returns:
            The loss and the sum of its penalties.
        """
        return self._total(batch, log_norms=False)[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the penalised loss, and log it and its parts."""
        log_norms = self.gradient_norms and logs_now(self.trainer)
        total, done, terms = self._total(batch, log_norms=log_norms)
        self.log("train/loss", done.loss.detach())
        self.log("train/loss_total", total.detach(), prog_bar=True)
        self.log_dict(penalty_numbers(self.penalties, terms))
        self.histograms.collect_norms(self.trainer, terms)
        if log_norms:
            self._log_norms(done, "grad_norm", collect=True)
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss, the metrics and the gradient norms of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss, the metrics and the gradient norms of a batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return what the net gives for a batch ``(x, y)`` or ``x``."""
        return self(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def configure_optimizers(self) -> Any:
        """Return the optimiser of the parameters that require grad, and its scheduler."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def on_train_epoch_end(self) -> None:
        """Write the histograms that the epoch has collected."""
        self.histograms.write_collected(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the penalties: plain numbers."""
        checkpoint["gpkit_penalties"] = self.penalties.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the state of the penalties; one that is new begins at its beginning."""
        self.penalties.load_state_dict(checkpoint.get("gpkit_penalties", {}))

    def _total(self, batch: Any, *, log_norms: bool) -> tuple[Tensor, Pass, AllTerms]:
        """Return what is trained on, the forward pass, and the terms of the penalties."""
        (x, y), needs = unpack(batch), self.needs
        compiled = self._compiled is not None and not self._first and torch.is_grad_enabled()
        self._first = False
        if compiled:
            done, terms = self._act_compiled(x, y, needs, log_norms=log_norms)
        else:
            done, terms = self._act(x, y, environments(batch), needs, log_norms=log_norms)
        total = self.penalties.total(done.loss, terms, self.net.parameters)
        assert total is not None
        return total, done, terms

    def _act(
        self, x: Tensor, y: Any, env: Tensor, needs: dict[str, Needs], *, log_norms: bool
    ) -> tuple[Pass, AllTerms]:
        """Make the training forward, and let each penalty act on it."""
        every, run = list(needs.values()), self._forward(needs)
        named = [a for n in every if not n.moves for a in n.activations]
        alone = len(every) == 1 and every[0].loss_at_two_points and not every[0].pooled
        alone = alone and not (log_norms or every[0].measures) and torch.is_grad_enabled()
        state = random_state(x.device) if alone else None
        order = max((n.order for n in every), default=0)
        with double_backward(order) if order else nullcontext():
            with captured(self.net, dict.fromkeys(named)) as activations:
                done = run(
                    x,
                    y,
                    graph_in_x=log_norms or any(n.input_graph for n in every),
                    per_sample=log_norms or any(n.sample_losses for n in every),
                )
            done = replace(done, activations=activations, state=state)
            scale = self._scale(x.device)
            if alone:  # one backward serves the loss and the penalty
                done = replace(done, loss=summarised(done.loss, scale))
            terms = {
                name: run.act(p, needs[name], done, y, env, step=self._step(), scale=scale)
                for name, p in self.penalties.items()
            }
        return done, terms

    def _act_compiled(
        self, x: Tensor, y: Any, needs: dict[str, Needs], *, log_norms: bool
    ) -> tuple[Pass, AllTerms]:
        """Do the same as one compiled graph."""
        assert self._compiled is not None
        step = self._step()
        acting = [n for n, p in self.penalties.items() if p.acts_at(step)]
        seeds = {n: torch.tensor(self.penalties[n].next_seed()) for n in acting}
        if any(needs[n].input_graph for n in acting):
            x = x.detach().requires_grad_()
        # Not double_backward(): its hook would be a new one, and a new graph, at every step.
        order = max((n.order for n in needs.values()), default=0)
        with sdpa_kernel(SDPBackend.MATH), elementary() if order > 1 else nullcontext():
            loss, parts = self._compiled(x, y, seeds)
        terms = {
            name: p.act_by(partial(_terms, parts.get(name)), step)
            for name, p in self.penalties.items()
        }
        done = Pass(x, None, loss, None)
        if log_norms:  # a compiled graph is gone after one backward: the norms have their own
            with isolated(self.net, 0, x.device):
                again = self._forward(needs)(x, y, graph_in_x=True, per_sample=True)
            done = replace(again, loss=loss)
        return done, terms

    def _differentiated(self, x: Tensor, y: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Return what each penalty differentiates, by name, and the loss."""
        done = self._forward(self.needs)(x, y, graph_in_x=False, per_sample=True)
        return {name: done.differentiated(own) for name, own in self.needs.items()}, done.loss

    def _forward(self, needs: dict[str, Needs]) -> Forward:
        features = any(own.features for own in needs.values())
        return Forward(self.net, self.loss, self.per_sample_loss, features)

    def _step(self) -> int | None:
        """Return the optimiser step; None without a trainer, where penalties count themselves."""
        trainer = trainer_of(self)
        return None if trainer is None else trainer.global_step

    def _scale(self, device: torch.device) -> Tensor | None:
        return scale_of(scaler_of(trainer_of(self)), device)

    def _evaluate(self, batch: Any, stage: str) -> None:
        # Norms need a graph, which inference mode and its tensors cannot give.
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradient_norms):
            x, y = unpack(tree_map_only(Tensor, Tensor.clone, batch))
            norms = self.gradient_norms
            done = self._forward({})(x, y, graph_in_x=norms, per_sample=norms)
            if norms:
                self._log_norms(done, f"{stage}/grad_norm", collect=False)
            self.log(f"{stage}/loss", done.loss.detach(), batch_size=len(x), **EVALUATION)
            metrics = self.val_metrics if stage == "val" else self.test_metrics
            metrics.update(prediction(done.output, y), y)
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric, batch_size=len(x), **EVALUATION)

    def _log_norms(self, done: Pass, prefix: str, *, collect: bool) -> None:
        options: dict[str, Any] = {} if collect else EVALUATION
        size = len(done.x)
        norm = weight_norm(done.loss, self.net.parameters())
        self.log(f"{prefix}/weight", norm, batch_size=size, **options)
        if done.x.requires_grad and done.losses is not None:
            norms = input_norms(done.losses, done.x)
            self.log(f"{prefix}/input", norms.mean(), batch_size=size, **options)
            if collect:
                self.histograms.collect(self.trainer, f"{prefix}/input", norms)


def _terms(parts: Any, weight: float) -> Terms:
    """Return the terms of what a compiled graph gave: n², values and their reduced value."""
    n2, values, reduced = parts
    return Terms(n2, values, weight, reduced)
