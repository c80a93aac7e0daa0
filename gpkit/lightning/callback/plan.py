"""What the penalties that act on a step need from it, and how it is captured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from gpkit.autodiff.activations import Change, moved
from gpkit.autodiff.compat import tree_leaves
from gpkit.autodiff.isolation import isolated
from gpkit.lightning.watch.probe import Capture, Probe, ProbeSpec
from gpkit.lightning.watch.replay import Silencer, StepCall, loss_of
from gpkit.needs import Needs


@dataclass
class Plan:
    """The penalties that act on a step, and the probe that captures what they need.

    Args:
        needs: of each penalty, by name.
        probe: captures what they need together.
    """

    needs: Mapping[str, Needs]
    probe: Probe

    def __post_init__(self) -> None:
        """Compute once what every step needs."""
        needs = self.needs.items()
        #: names of the penalties that pool the gradients of micro-batches or ranks
        self.pooled = tuple(name for name, own in needs if own.pooled)
        #: names of the penalties that take first gradients of the loss at two points
        self.two_points = tuple(name for name, own in needs if own.loss_at_two_points)
        #: whether a penalty may rerun the training step, with the same random numbers
        self.runs_again = any(own.runs_again for _, own in needs)
        #: whether a penalty may draw random numbers
        self.draws = not all(own.plain for _, own in needs)


@dataclass(frozen=True)
class PenalizedNet:
    """The module or submodule whose weights, inputs or activations the penalties are about.

    Args:
        net: the module.
        title: how error messages call it, such as "the submodule 'net'".
        compiled: whether the LightningModule, or a part of it, runs compiled.
        silencer: keeps reruns of the LightningModule's training step silent.
        call: which call of a submodule is meant that a training step calls several times, from 0.
    """

    net: nn.Module
    title: str
    compiled: bool
    silencer: Silencer
    call: int | None = None

    def probe(
        self, needs: Iterable[Needs], replacements: Mapping[str, tuple[Change, int]] | None = None
    ) -> Probe:
        """Return a probe that captures what penalties need.

        Args:
            needs: of the penalties.
            replacements: what to compute with instead, see `Probe`.

        Returns:
            The probe; its hooks are not registered yet.
        """
        spec = probe_spec(needs)
        eager = self.compiled and spec.eager
        return Probe(self.net, self.title, spec, replacements, call=self.call, eager=eager)

    def rerun(
        self,
        module: nn.Module,
        call: StepCall,
        needs: Needs,
        *xs: Tensor,
        indices: Iterable[int] = (0,),
        before: Sequence[Tensor] = (),
    ) -> Any:
        """Rerun the training step, and return what a penalty differentiates.

        Args:
            module: the LightningModule. It is an argument so that `isolated` finds its buffers.
            call: the step.
            needs: of the penalty.
            *xs: the input or activations to compute with; if missing, those of the batch.
            indices: the call of the submodule that gets each of them.
            before: the activations of the batch, where several are moved.

        Returns:
            The loss, or the output or activation of the net.
        """
        changes = moved(_moved(needs), xs, before).items() if xs else ()
        pairs = zip(changes, indices, strict=False)
        replacements = {name: (change, index) for (name, change), index in pairs}
        with self.silencer.silenced(), self.probe([needs], replacements) as capture:
            output = call.training_step(*call.args, **call.kwargs)
        return differentiated(needs, capture, loss_of(output))

    def indices(self, needs: Needs, capture: Capture) -> tuple[int, ...]:
        """Return which call of each submodule was captured whose tensor a penalty moves."""
        calls = [len(capture.calls.get(name, ())) for name in _moved(needs)]
        return tuple((self.call or 0) if count > 1 else 0 for count in calls)

    def rerun_isolated(self, module: Any, call: StepCall, needs: Needs) -> Tensor:
        """Rerun the training step with the same random numbers, and return the loss."""
        with isolated(
            module, call.start or (), module.device, max(needs.order, 1), twice=needs.order > 0
        ):
            loss: Tensor = self.rerun(module, call, needs)
        return loss


def _moved(needs: Needs) -> tuple[str, ...]:
    """Return the names of the tensors that a penalty moves: activations, or "" for the input."""
    return ("",) if needs.moves or not needs.in_activation else needs.in_activation


def probe_spec(needs: Iterable[Needs]) -> ProbeSpec:
    """Return what a probe has to capture for penalties with these needs."""
    needs = list(needs)
    named = [a for n in needs if not n.calls_net for a in n.activations]
    return ProbeSpec(
        order=max((n.order for n in needs), default=0),
        x=any(n.reads_input for n in needs),
        output=any(n.reads_output for n in needs),
        activations=tuple(dict.fromkeys(named)),
        moves=any(n.runs_again and not n.in_weights for n in needs),
    )


def differentiated(needs: Needs, capture: Capture, loss: Tensor | None) -> Any:
    """Return what a penalty differentiates: an activation, the loss, or the output of the net."""
    if needs.differentiates == "activation":
        return capture.activations.get(needs.activations[0])
    return loss if needs.of_loss else capture.output


def warn_of_rows(watched: PenalizedNet, capture: Capture, batch: Any) -> None:
    """Warn if the input of a submodule has not one row for each sample of the batch.

    Args:
        watched: the net that the input was captured from.
        capture: what the probe captured.
        batch: of the training step.
    """
    x = capture.x
    if x is None or not x.ndim:
        return
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim]
    samples = getattr(batch, "num_graphs", None)  # of a batch of graphs
    if samples is None:
        alike = sum(len(t) for t in tensors if t.shape[1:] == x.shape[1:])  # may be concatenated
        samples = max(alike, len(tensors[0]) if tensors else len(x))
    rows = len(x)
    if rows > samples:  # fewer are a part of the batch, or fakes
        rank_zero_warn(
            f"{watched.title} gets an input of {rows} rows, and the batch has {samples} samples: "
            "each row counts as a sample, with a norm of its own, and the mean loss is taken to be "
            "over the rows. If several rows belong to a sample, call the penalty in your own "
            "training step with groups=..., or choose a submodule with a row for each sample"
        )
