"""Any net, wrapped: a LightningModule that trains on a loss and gradient penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpkit import checks
from gpkit.calls import Computed
from gpkit.captures import captured
from gpkit.classifier import features
from gpkit.environments import EnvironmentPenalty
from gpkit.isolation import double_backward, isolated, random_state
from gpkit.lightning.compiled import CompiledLoss
from gpkit.lightning.losses import LossFunction, per_sample
from gpkit.lightning.metrics import as_metrics, prediction
from gpkit.lightning.norms import input_norms, weight_norm
from gpkit.lightning.passes import (
    Pass,
    activation_names,
    differentiated,
    environments,
    needs_losses,
    repeated,
    reuses_input_graph,
    takes_the_loss_alone,
    unpack,
    variable,
    with_features,
)
from gpkit.lightning.scaling import scale_of, scaler_of
from gpkit.norm_layers import elementary
from gpkit.penalty import GradientPenalty, Terms
from gpkit.sums import Penalties, penalties_by_name
from gpkit.together import summarised
from gpkit.variables import weights


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
    as it enters the loss) and ``penalty/<name>/weight``; on the steps that the trainer logs,
    ``grad_norm/weight``, the norm ‖∇_θ L‖ of the loss without penalties, and ``grad_norm/input``,
    the mean over samples of ‖∇_x ℓ_i‖; at validation and test ``<stage>/loss``, the metrics and
    ``<stage>/grad_norm/*``; and TensorBoard histograms of the norms behind penalties and inputs.

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
        self.penalties = penalties_by_name(penalty)
        self.make_optimizer = optimizer or torch.optim.Adam
        self.make_scheduler = scheduler
        self.val_metrics = as_metrics(metrics, loss).clone()
        self.test_metrics = as_metrics(metrics, loss).clone()
        self.gradient_norms = gradient_norms
        self.histogram_every_n_epochs = checks.integer(
            "histogram_every_n_epochs=...", histogram_every_n_epochs, 0
        )
        self._histograms: dict[str, list[Tensor]] = {}
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
        logged = self.gradient_norms and self._logs_this_step()
        total, done, terms = self._total(batch, log_norms=logged)
        self.log("train/loss", done.loss.detach())
        self.log("train/loss_total", total.detach(), prog_bar=True)
        for name, term in terms.items():
            value = done.loss.new_zeros(()) if term is None else term.penalty.detach()
            self.log(f"penalty/{name}", value)
            self.log(f"penalty/{name}/weight", 0.0 if term is None else term.weight)
            if term is not None:
                self._collect(f"penalty/{name}/norm", term.norms)
        if logged:
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
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, parts in self._histograms.items():
                    values = torch.cat(parts).float().cpu()
                    logger.experiment.add_histogram(name, values, self.global_step)
        self._histograms.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the penalties: plain numbers."""
        states = {name: penalty.state_dict() for name, penalty in self.penalties.items()}
        checkpoint["gpkit_penalties"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the state of the penalties; one that is new begins at its beginning."""
        for name, state in checkpoint.get("gpkit_penalties", {}).items():
            if name in self.penalties:
                self.penalties[name].load_state_dict(state)

    def _total(
        self, batch: Any, *, log_norms: bool
    ) -> tuple[Tensor, Pass, dict[str, Terms | None]]:
        x, y = unpack(batch)
        if self._compiled is not None and not self._first and torch.is_grad_enabled():
            return self._compiled_total(x, y, log_norms=log_norms)
        self._first = False
        penalties = self.penalties.values()
        graph_in_x = log_norms or any(map(reuses_input_graph, penalties))
        per_sample = log_norms or any(map(needs_losses, penalties))
        named = [n for p in penalties if not p.at.moves for n in activation_names(p)]
        twice = not all(p.estimator.first_order for p in penalties)
        alone = not log_norms and torch.is_grad_enabled() and takes_the_loss_alone(penalties)
        state = random_state(x.device) if alone else None
        with double_backward(self._order()) if twice else nullcontext():
            with captured(self.net, dict.fromkeys(named)) as activations:
                done = self._forward(x, y, graph_in_x=graph_in_x, per_sample=per_sample)
            done = replace(done, activations=activations, state=state)
            if alone:  # one backward serves the loss and the penalty
                done = replace(done, loss=summarised(done.loss, self._scale(x.device)))
            env = environments(batch)
            terms = {name: self._act(p, done, y, env) for name, p in self.penalties.items()}
        total = done.loss
        for term in terms.values():
            total = total if term is None else term.added_to(total)
        self._measure(done.loss, terms)
        return self._rescaled(total), done, terms

    def _rescaled(self, total: Tensor) -> Tensor:
        """Return the total divided by the greatest scale that a penalty's weight asks for."""
        scale = max((p.loss_scale() for p in self.penalties.values()), default=1.0)
        return total if scale == 1 else total / scale

    def _measure(self, loss: Tensor, terms: dict[str, Terms | None]) -> None:
        """Show the gradients of loss and penalties to weights that adapt to them."""
        for name, term in terms.items():
            penalty = self.penalties[name]
            measure = getattr(penalty.weight, "measure", None)
            if measure is not None and term is not None and torch.is_grad_enabled():
                measure(loss, term.penalty, self.net.parameters(), penalty.step - 1)

    def _compiled_total(
        self, x: Tensor, y: Any, *, log_norms: bool
    ) -> tuple[Tensor, Pass, dict[str, Terms | None]]:
        assert self._compiled is not None
        factors = {n: p.count_step(self._step()) for n, p in self.penalties.items()}
        acting = [n for n, factor in factors.items() if factor]
        seeds = {n: torch.tensor(self.penalties[n].next_seed()) for n in acting}
        if any(reuses_input_graph(self.penalties[n]) for n in acting):
            x = x.detach().requires_grad_()
        # Not double_backward(): its hook would be a new one, and a new graph, at every step.
        norm_layers = elementary() if self._order() > 1 else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), norm_layers:
            loss, parts = self._compiled(x, y, seeds)
        terms: dict[str, Terms | None] = dict.fromkeys(factors)
        total = loss
        for name, (n2, values, reduced) in parts.items():
            term = Terms(n2, values, factors[name], reduced)
            self.penalties[name].observe(term)
            terms[name], total = term, term.added_to(total)
        done = Pass(x, None, loss, None)
        if log_norms:  # a compiled graph is gone after one backward: the norms have their own
            with isolated(self.net, 0, x.device):
                done = self._forward(x, y, graph_in_x=True, per_sample=True)
        return self._rescaled(total), done, terms

    def _differentiated(self, x: Tensor, y: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Return what each penalty differentiates, by name, and the loss."""
        done = self._forward(x, y, graph_in_x=False, per_sample=True)
        return {name: differentiated(p, done) for name, p in self.penalties.items()}, done.loss

    def _order(self) -> int:
        """Return the highest order of the penalties."""
        return max((penalty.order for penalty in self.penalties.values()), default=1)

    def _step(self) -> int | None:
        """Return the optimiser step; None without a trainer, where penalties count themselves."""
        return self.trainer.global_step if self._trainer is not None else None

    def _scale(self, device: torch.device) -> Tensor | None:
        return scale_of(scaler_of(self._trainer), device)

    def _forward(self, x: Tensor, y: Any, *, graph_in_x: bool, per_sample: bool) -> Pass:
        if graph_in_x and x.is_floating_point():
            x = x.detach().requires_grad_()  # the user's own tensor keeps its requires_grad
        wanted = any(with_features(p) for p in self.penalties.values())
        output, a = features(self.net, x) if wanted else (self.net(x), None)
        losses = self.per_sample_loss(output, y) if per_sample else None
        loss = self.loss(output, y)
        return Pass(x, output, loss if loss.ndim == 0 else loss.mean(), losses, a)

    def _act(self, penalty: GradientPenalty, done: Pass, y: Any, env: Tensor) -> Terms | None:
        options: dict[str, Any] = {"step": self._step()}
        options["scale"] = self._scale(done.x.device)
        if isinstance(penalty, EnvironmentPenalty):
            output = (done.output, done.features) if with_features(penalty) else done.output
            return penalty.act(output, y, env, **options)
        if isinstance(penalty.wrt, weights):
            if penalty.estimator.reuses_graph:
                return penalty.act(differentiated(penalty, done), self.net, **options)

            def closure() -> Any:
                losses = penalty.of == "loss" and penalty.scope == "sample"
                x = done.x.detach()
                return differentiated(
                    penalty, self._forward(x, y, graph_in_x=False, per_sample=losses)
                )

            if done.state is not None:
                again = Computed(done.loss, closure, done.state)
                return penalty.act(again, self.net, **options)
            return penalty.act(closure, self.net, **options)
        if reuses_input_graph(penalty):
            return penalty.act(differentiated(penalty, done), variable(penalty, done), **options)

        x = done.x.detach()

        def function(z: Tensor) -> Any:
            output = self.net(z)
            if penalty.of != "loss":
                return output
            losses = self.per_sample_loss(output, repeated(y, len(x), len(z)))
            if penalty.estimator.first_order and losses.stride() == (0,):
                raise ValueError(
                    "finite differences in the inputs need the loss of each sample, and "
                    "`loss=...` gives one number: give one with a `reduction`, or that gives [B]"
                )
            return losses

        net = [self.net] if activation_names(penalty) else []
        return penalty.act(function, *net, real=x, fake=x.roll(1, 0), **options)

    def _evaluate(self, batch: Any, stage: str) -> None:
        # Norms need a graph, which inference mode and its tensors cannot give.
        with torch.inference_mode(False), torch.set_grad_enabled(self.gradient_norms):
            x, y = unpack(torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, batch))
            norms = self.gradient_norms
            done = self._forward(x, y, graph_in_x=norms, per_sample=norms)
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
                self._collect(f"{prefix}/input", norms)

    def _logs_this_step(self) -> bool:
        every = getattr(self.trainer, "log_every_n_steps", 0)
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _collect(self, name: str, norms: Tensor) -> None:
        """Keep norms for the histogram of this epoch, if it has one."""
        every = self.histogram_every_n_epochs
        if every and self.current_epoch % every == 0:
            self._histograms.setdefault(f"{name}/histogram", []).append(norms.detach())


EVALUATION: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
