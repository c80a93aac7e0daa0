"""A training step and the penalties on it as one graph: `GradientPenaltyCallback(compile=True)`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gpkit.axes.parameters import layers_for
from gpkit.compiling.entry import compiled
from gpkit.compiling.named import begin, keeping, terms_of
from gpkit.estimators.base import Recomputable
from gpkit.formula import Terms
from gpkit.lightning.callback.plan import PenalizedNet, differentiated, losses_of, probe_spec
from gpkit.lightning.watch.capture import Capture
from gpkit.lightning.watch.entries import net_of_entries
from gpkit.lightning.watch.probe import Probe
from gpkit.lightning.watch.replay import StepCall, TrainingStep, loss_of
from gpkit.needs import Needs
from gpkit.sums import PenaltySum


class CompiledStep:
    """A training step with its penalties as one graph, see `gpkit.compile`.

    The training step is the module's own code. What it logs leaves the graph beside its output, and
    is logged then.

    Args:
        watched: the module or submodule that the penalties are about.
        penalties: by name.
        needs: of each penalty, by name.

    Attributes:
        training_step: the module's own method, or what other callbacks have made of it.
    """

    def __init__(
        self, watched: PenalizedNet, penalties: PenaltySum, needs: Mapping[str, Needs]
    ) -> None:
        self.watched = watched
        self.training_step: TrainingStep = watched.silencer.module.training_step
        self.penalties, self.needs = penalties, needs
        self.spec = probe_spec(needs.values(), of_output=callable(watched.losses))
        self.shows_losses = any(n.sample_losses and n.given_losses for n in needs.values())
        self.layers: list[Any] = [penalties[n] for n, own in needs.items() if own.layers]
        self.loss = compiled(self.computed, penalties)

    @property
    def runs(self) -> bool:
        """Whether it is compiled, or not yet known not to be."""
        return self.loss is not None and self.loss.obstacle is None and not self.loss.slower

    def __call__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[str, Any],
        scale: Tensor | None,
        step: int,
    ) -> tuple[Any, dict[str, Terms | None]]:
        """Run the step.

        Args:
            args: of the training step.
            kwargs: of the training step.
            given: what the batch gives each penalty, by name.
            scale: of a gradient scaler, or None.
            step: the optimiser step.

        Returns:
            The output of the training step, and the terms of the penalties by name.
        """
        assert self.loss is not None
        begin(self.penalties, step)
        module = self.watched.silencer.module
        output, values, logged = self.loss(module, args, kwargs, given, scale)
        for name, own, options in logged:
            getattr(module, name)(*own, **options)
        return output, terms_of(self.penalties, self.loss, values)

    def total(self, loss: Tensor, terms: dict[str, Terms | None], parameters: Any) -> Tensor:
        """Return the total loss; a weight that adapts to gradients measures them here."""
        with keeping(self.penalties, self.loss):
            total = self.penalties.total(loss, terms, parameters)
        assert total is not None
        return total

    def computed(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[str, Any],
        scale: Tensor | None,
    ) -> tuple[Any, dict[str, Tensor | None], list[Any]]:
        """Return what is compiled: the output, the value of each penalty, and what was logged.

        The module is an argument so that its buffers and random numbers are found.
        """
        watched = self.watched
        options: Any = {"call": watched.call, "own_batch": watched.own_batch}
        probe = Probe(watched.net, watched.title, self.spec, **options)
        call = StepCall(self.training_step, args, kwargs)
        recording = layers_for(self.layers, watched.net)
        with watched.silencer.kept() as logged, probe as capture, recording as capture.layers:
            entered = watched.entered(call, capture, self.spec.entries)
            output = self.training_step(*entered.args, **entered.kwargs)
        loss = loss_of(output)
        if self.shows_losses:
            capture.losses = losses_of(watched.losses, output, capture, call.batch)
        values: dict[str, Tensor | None] = {}
        for name, needs in self.needs.items():
            f, *variables = self._arguments(needs, capture, loss, call.batch)
            own = self.penalties[name].act(f, *variables, scale=scale, **given.get(name, {}))
            values[name] = None if own is None else own.reduced
        return output, values, logged

    def _arguments(self, needs: Needs, capture: Capture, loss: Any, batch: Any) -> list[Any]:
        """Return the positional arguments for ``penalty.act``."""
        net, entries = self.watched.net, {name: capture.entries[name] for name in needs.names}
        if needs.calls_net and needs.names:
            places = [capture.paths[name] for name in needs.names]
            f = net_of_entries(net, capture.arguments[:2], places)
            return [f, {name: x.detach() for name, x in entries.items()}]
        if needs.calls_net:
            assert capture.x is not None
            module = [net] if needs.activations else []
            return [capture.net_at(net), capture.x.detach(), *module]
        value = differentiated(needs, capture, loss, batch)
        if needs.in_weights:
            return [Recomputable(value, net, (), layers=capture.layers), net]
        x: Any = tuple(capture.activations[name] for name in needs.in_activation) or capture.x
        mean = needs.of_loss and not needs.given_losses
        return [Recomputable(value, net, (), mean=mean), entries or x]


def compiled_step(
    watched: PenalizedNet,
    penalties: PenaltySum,
    needs: Mapping[str, Needs],
    *,
    automatic: bool,
    sharded: bool,
) -> CompiledStep | None:
    """Return a compiled training step; None, with a warning that says why, if it cannot be one.

    Args:
        watched: the module or submodule that the penalties are about.
        penalties: by name.
        needs: of each penalty, by name.
        automatic: whether Lightning calls the optimiser.
        sharded: whether FSDP2 has sharded the module.
    """
    said = None
    if not automatic:
        said = "the module optimises manually, so its training step holds backward passes"
    elif sharded:
        said = "FSDP2 gathers the weights in hooks, which a graph does not hold"
    elif watched.compiled:
        said = "the module is compiled already: give gpkit the module as it is"
    else:
        reruns = [n for n, own in needs.items() if not _in_one_pass(own)]
        if reruns:
            said = (
                f"{reruns[0]!r} runs the training step again, which logs and may do anything: use "
                "a penalty at the data or of the net's output, or gpkit.PenalizedModule"
            )
    if said is not None:
        warnings.warn(f"`compile=True` has no effect: {said}", stacklevel=3)
        return None
    made = CompiledStep(watched, penalties, needs)
    return made if made.runs else None


def _in_one_pass(needs: Needs) -> bool:
    """Whether a penalty needs no more than one training step, and the net at other points."""
    return needs.calls_net or not (needs.environments or needs.runs_again)
