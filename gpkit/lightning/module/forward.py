"""The forward pass of a net and its loss, and the penalties on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from gpkit.autodiff.activations import Named, features
from gpkit.autodiff.layers.recording import Recording
from gpkit.autodiff.state import Start
from gpkit.autodiff.tracing.points import variable
from gpkit.axes.given.sample_weight import has_steps, kept
from gpkit.axes.parameters import layers_for
from gpkit.estimators.base import Recomputable
from gpkit.formula import Terms
from gpkit.lightning.batches import Batch, repeated
from gpkit.losses import LossFunction, has_reduction, logits, taken
from gpkit.needs import Needs
from gpkit.penalty import Penalty


@dataclass(frozen=True)
class ForwardPass:
    """The tensors of one forward pass.

    Args:
        x: the input, ``[B, *S]``.
        output: the output of the net.
        loss: the mean loss without penalties, one number.
        losses: the loss of each sample, ``[B]``; None if no penalty needs it.
        features: the input of the net's last linear layer, ``[B, d]``; None if no penalty needs it.
        activations: the activations that penalties name, ``[B, *H]`` each.
        start: what the pass started from; None if no penalty repeats the pass.
        layers: the calls of the net's layers; None if no penalty needs them.
        entries: the inputs of the net that penalties name, by their names in the batch.
    """

    x: Tensor
    output: Any
    loss: Tensor
    losses: Tensor | None = None
    features: Tensor | None = None
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    start: Start | None = None
    layers: Recording | None = None
    entries: Mapping[str, Tensor] = field(default_factory=dict)

    def differentiated(self, needs: Needs) -> Any:
        """Return what a penalty differentiates: the output, an activation, or the loss."""
        if needs.environments:
            return (self.output, self.features) if needs.features else self.output
        if needs.differentiates == "activation":
            return self.activations[needs.activations[0]]
        if not needs.of_loss:
            return self.output
        return self.losses if needs.sample_losses else self.loss

    def variable(self, needs: Needs) -> Any:
        """Return what a penalty differentiates in: the input, entries by name, or activations."""
        if needs.names:
            return {name: self.entries[name] for name in needs.names}
        found = tuple(self.activations[name] for name in needs.in_activation)
        return found or self.x


@dataclass(frozen=True)
class ForwardRunner:
    """Runs a net and its loss, and evaluates penalties on the result.

    Args:
        net: any module.
        loss: ``(output, y) -> loss``.
        sample_losses: ``(output, y) -> losses``, ``[B]``.
        features: whether to capture the input of the last linear layer.
        layers: the penalties that can use the calls of the layers.
        batch: supplies the other inputs of a net with several; None if it has one.
        names: the inputs of the net that penalties name.
    """

    net: nn.Module
    loss: LossFunction
    sample_losses: LossFunction
    features: bool = False
    layers: Sequence[Any] = ()
    batch: Batch | None = None
    names: Sequence[str] = ()

    def run(self, x: Tensor) -> Any:
        """Return the output of the net for an input ``x``."""
        alone = self.batch is None or self.batch.alone
        output = self.net(x) if alone else self.batch.call(self.net, x)  # type: ignore[union-attr]
        if isinstance(output, Tensor) or not has_reduction(self.loss):
            return output
        return logits(output)

    def run_at(self, entries: Mapping[str, Tensor]) -> Any:
        """Return the output of the net for other entries of the batch."""
        assert self.batch is not None
        batch = self.batch.at(entries)
        return replace(self, batch=batch).run(batch.x)

    def run_with_features(self, x: Tensor) -> tuple[Any, Tensor]:
        """Return the output, and the input of the last linear layer."""
        if self.batch is None:
            return features(self.net, x)
        return features(self.net, *self.batch.args_at(x), **self.batch.kwargs_at(x))

    def __call__(self, x: Tensor, y: Any, *, graph_in_x: bool, per_sample: bool) -> ForwardPass:
        """Run a forward pass.

        Args:
            x: ``[B, *S]``.
            y: the target.
            graph_in_x: whether the input must require grad. The net then gets a detached tensor;
                ``x`` itself stays unchanged.
            per_sample: whether to compute the loss of each sample.

        Returns:
            The tensors of the pass.
        """
        entries: dict[str, Tensor] = {}
        runner = self
        if self.names and self.batch is not None:
            found = self.batch.entries(self.names).items()
            entries = {name: variable(e) if graph_in_x else e.detach() for name, e in found}
            batch = self.batch.at(entries)
            runner, x = replace(self, batch=batch), batch.x
        if graph_in_x and x.is_floating_point() and not any(x is e for e in entries.values()):
            x = variable(x)
        return runner.passed(x, y, entries, per_sample=per_sample)

    def passed(
        self, x: Tensor, y: Any, entries: Mapping[str, Tensor], *, per_sample: bool
    ) -> ForwardPass:
        """Run a forward pass at ``x``; the other arguments are those of a call."""
        with layers_for(self.layers, self.net) as layers:
            output, a = self.run_with_features(x) if self.features else (self.run(x), None)
        losses = self.sample_losses(output, y) if per_sample else None
        loss = taken(self.loss, output, y)
        return ForwardPass(
            x,
            output,
            loss if loss.ndim == 0 else loss.mean(),
            losses,
            a,
            layers=layers,
            entries=entries,
        )

    def act(
        self,
        penalty: Penalty,
        needs: Needs,
        forward: ForwardPass,
        y: Any,
        env: Tensor,
        **options: Any,
    ) -> Terms | None:
        """Evaluate a penalty on the forward pass of the training loss.

        Args:
            penalty: the penalty.
            needs: of the penalty.
            forward: the forward pass.
            y: the target.
            env: the environment of each sample, ``[B]``.
            **options: ``step`` and ``scale`` of ``penalty.act``.

        Returns:
            The terms; None if the penalty does not act on this step.

        Raises:
            TypeError: if it differentiates in an input of integers.
        """
        if needs.environments:
            return penalty.act(forward.differentiated(needs), y, env, **options)
        if needs.weighs_steps and has_steps(options.get("sample_weight")):
            weights = options["sample_weight"]
            runner = replace(self, sample_losses=partial(self.sample_losses, weights=weights))
            forward = replace(forward, losses=runner.sample_losses(forward.output, y))
            options["sample_weight"] = kept(weights)
            return runner.act(penalty, needs, forward, y, env, **options)
        if needs.in_weights and needs.reuses_graph:
            value = forward.differentiated(needs)
            if needs.layers:
                value = Recomputable(value, self.net, (), layers=forward.layers)
            return penalty.act(value, self.net, **options)
        reads = needs.reads_input and not needs.names
        if reads and not needs.moves and not forward.x.is_floating_point():
            raise TypeError(
                f"a penalty in the input needs floating-point samples; got {forward.x.dtype}: "
                "differentiate in an activation, as wrt=gpkit.activation('embedding'), or choose "
                "other inputs=[...]"
            )
        if needs.input_graph:
            value = forward.differentiated(needs)
            if isinstance(getattr(penalty, "of", None), Named):
                value = Recomputable(value, self.net, ())
            return penalty.act(value, forward.variable(needs), **options)
        x = forward.x.detach()
        if needs.in_weights:

            def closure() -> Any:
                again = self(x, y, graph_in_x=False, per_sample=needs.sample_losses)
                return again.differentiated(needs)

            if forward.start is None:
                return penalty.act(closure, self.net, **options)
            given = Recomputable(forward.loss, closure, forward.start)
            return penalty.act(given, self.net, **options)

        def function(z: Any) -> Any:
            points = len(next(iter(z.values())) if needs.names else z)
            output = self.run_at(z) if needs.names else self.run(z)
            if not needs.of_loss:
                return output
            losses = self.sample_losses(output, repeated(y, len(x), points))
            if needs.order == 0 and losses.stride() == (0,):
                raise ValueError(
                    "finite differences in the inputs need the loss of each sample; got a "
                    "`loss=...` that returns one number: use a loss with a `reduction`, or one "
                    "that returns [B]"
                )
            return losses

        if needs.names:
            variable = {name: entry.detach() for name, entry in forward.variable(needs).items()}
            rolled = {name: entry.roll(1, 0) for name, entry in variable.items()}
            return penalty.act(function, real=variable, fake=rolled, **options)
        net = [self.net] if needs.activations else []
        return penalty.act(function, *net, real=x, fake=x.roll(1, 0), **options)


def require_fit(needs: Mapping[str, Needs]) -> None:
    """Refuse penalties that do not fit the batches of a module, and warn of missing samples.

    Args:
        needs: by the names of the penalties.

    Raises:
        ValueError: if a penalty takes some samples, and the loss has the targets of all.
    """
    for name, own in needs.items():
        if own.part:
            raise ValueError(f"penalty {name!r}: {own.part}")
        if own.fakes:
            pl.utilities.rank_zero_warn(f"penalty {name!r}: {own.fakes}. Here it is x_{{i-1}}")
