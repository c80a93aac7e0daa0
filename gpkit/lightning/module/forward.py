"""A forward pass of a net and its loss on a batch, and what each penalty takes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.activations import features
from gpkit.autodiff.random import RandomState
from gpkit.estimators.base import Recomputable
from gpkit.formula import Terms
from gpkit.lightning.batches import repeated
from gpkit.lightning.module.losses import LossFunction
from gpkit.needs import Needs
from gpkit.penalty import Penalty


@dataclass(frozen=True)
class Pass:
    """One forward pass: the input it was made with, and what came out.

    Args:
        x: ``[B, *S]``.
        output: what the net gave.
        loss: the mean loss, without penalties.
        losses: the loss of each sample, ``[B]``; None where it is not needed.
        features: what the net's last linear layer was given, ``[B, d]``; likewise.
        activations: those that penalties name, ``[B, *H]`` each.
        state: of the random numbers before it, where it will be made again with the same ones.
    """

    x: Tensor
    output: Any
    loss: Tensor
    losses: Tensor | None
    features: Tensor | None = None
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    state: RandomState | None = None

    def differentiated(self, needs: Needs) -> Any:
        """Return what a penalty differentiates of this pass."""
        if needs.environments:
            return (self.output, self.features) if needs.features else self.output
        if needs.differentiates == "activation":
            return self.activations[needs.activations[0]]
        if not needs.of_loss:
            return self.output
        return self.losses if needs.sample_losses else self.loss

    def variable(self, needs: Needs) -> Tensor:
        """Return what a penalty at the data differentiates in: the input or an activation."""
        return self.activations[needs.in_activation] if needs.in_activation else self.x


@dataclass(frozen=True)
class Forward:
    """Runs a net and its loss, and penalties on them.

    Args:
        net: any module.
        loss: ``(output, y) -> loss``.
        sample_losses: ``(output, y) -> [B]``.
        features: whether to catch what the last linear layer is given.
    """

    net: nn.Module
    loss: LossFunction
    sample_losses: LossFunction
    features: bool = False

    def __call__(self, x: Tensor, y: Any, *, graph_in_x: bool, per_sample: bool) -> Pass:
        """Return a forward pass.

        Args:
            x: ``[B, *S]``.
            y: the target.
            graph_in_x: whether the input is to require grad; the user's own tensor stays as it is.
            per_sample: whether the loss of each sample is needed.

        Returns:
            The pass.
        """
        if graph_in_x and x.is_floating_point():
            x = x.detach().requires_grad_()
        output, a = features(self.net, x) if self.features else (self.net(x), None)
        losses = self.sample_losses(output, y) if per_sample else None
        loss = self.loss(output, y)
        return Pass(x, output, loss if loss.ndim == 0 else loss.mean(), losses, a)

    def act(
        self, penalty: Penalty, needs: Needs, done: Pass, y: Any, env: Tensor, **options: Any
    ) -> Terms | None:
        """Return the terms of a penalty on a forward pass; None where it skips the step.

        Args:
            penalty: what acts.
            needs: of the penalty.
            done: the forward pass of the training loss.
            y: the target.
            env: the environment of each sample, ``[B]``.
            **options: step and scale of the call.

        Returns:
            The terms.
        """
        if needs.environments:
            return penalty.act(done.differentiated(needs), y, env, **options)
        if needs.in_weights and needs.reuses_graph:
            return penalty.act(done.differentiated(needs), self.net, **options)
        if needs.input_graph:
            return penalty.act(done.differentiated(needs), done.variable(needs), **options)
        x = done.x.detach()
        if needs.in_weights:

            def closure() -> Any:
                again = self(x, y, graph_in_x=False, per_sample=needs.sample_losses)
                return again.differentiated(needs)

            given = closure if done.state is None else Recomputable(done.loss, closure, done.state)
            return penalty.act(given, self.net, **options)

        def function(z: Tensor) -> Any:
            output = self.net(z)
            if not needs.of_loss:
                return output
            losses = self.sample_losses(output, repeated(y, len(x), len(z)))
            if needs.order == 0 and losses.stride() == (0,):
                raise ValueError(
                    "finite differences in the inputs need the loss of each sample, and "
                    "`loss=...` gives one number: give one with a `reduction`, or that gives [B]"
                )
            return losses

        net = [self.net] if needs.activations else []
        return penalty.act(function, *net, real=x, fake=x.roll(1, 0), **options)
