"""What the penalties that act on a step need from it, and how it is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.activations import moved
from gpkit.autodiff.compat import tree_leaves
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.tracing.points import variable
from gpkit.axes.given.sample_weight import has_steps
from gpkit.lightning.batches import entries
from gpkit.lightning.watch.capture import Capture, ProbeSpec
from gpkit.lightning.watch.entries import (
    Path,
    entry,
    finding_of_kind,
    moved_to,
    path_in,
    replaced,
)
from gpkit.lightning.watch.probe import Probe, Replacements
from gpkit.lightning.watch.replay import Silencer, StepCall, loss_of
from gpkit.losses import of_each_sample
from gpkit.needs import Needs

Losses = str | Callable[[Any, Any], Tensor]


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
        losses: where a step shows the loss of each sample: the key of an entry of what it returns,
            or a function of the output of the net and the batch; None if it shows none.
        own_batch: whether names of inputs mean entries of the batch first, and not of the call.
    """

    net: nn.Module
    title: str
    compiled: bool
    silencer: Silencer
    call: int | None = None
    losses: Losses | None = None
    own_batch: bool = True

    def probe(self, needs: Iterable[Needs], replacements: Replacements | None = None) -> Probe:
        """Return a probe that captures what penalties need.

        Args:
            needs: of the penalties.
            replacements: what to compute with instead, see `Probe`.

        Returns:
            The probe; its hooks are not registered yet.
        """
        spec = probe_spec(needs, of_output=callable(self.losses))
        eager = self.compiled and spec.eager
        options: dict[str, Any] = {"call": self.call, "own_batch": self.own_batch}
        return Probe(self.net, self.title, spec, replacements, eager=eager, **options)

    def rerun(
        self,
        module: nn.Module,
        call: StepCall,
        needs: Needs,
        *xs: Tensor,
        indices: Iterable[int] = (0,),
        before: Sequence[Tensor] = (),
        paths: Sequence[Path | None] = (),
    ) -> Any:
        """Rerun the training step, and return what a penalty differentiates.

        Args:
            module: the LightningModule. It is an argument so that `isolated` finds its buffers.
            call: the step.
            needs: of the penalty.
            *xs: the input or activations to compute with; if missing, those of the batch.
            indices: the call of the submodule that gets each of them.
            before: the activations of the batch, where several are moved.
            paths: where the batch has each of the inputs by name; None for one of the call.

        Returns:
            The losses, the loss, or the output or activation of the net.
        """
        changes: Any = () if needs.names or not xs else moved(_moved(needs), xs, before).items()
        pairs = zip(changes, indices, strict=False)
        replacements = {name: (change, index) for (name, change), index in pairs}
        if needs.names and xs:
            call, replacements = self.with_entries(call, needs, xs, paths, *indices)
        with self.silencer.silenced(), self.probe([needs], replacements) as capture:
            output = call.training_step(*call.args, **call.kwargs)
        if needs.sample_losses:
            capture.losses = losses_of(self.losses, output, capture, call.batch)
        return differentiated(needs, capture, loss_of(output), call.batch)

    def entered(self, call: StepCall, capture: Capture, names: Sequence[str]) -> StepCall:
        """Return a step in whose batch the entries of these names require grad.

        Args:
            call: the step. Its batch is left as it is.
            capture: is told the entries.
            names: of the entries. Those that the batch does not have are left out.

        Returns:
            The step.
        """
        for name in names:
            path = path_in(call.batch, name)
            x = None if path is None else entry(call.batch, path)
            if path is None or x is None:
                continue
            if not x.is_floating_point():
                capture.problems[name] = finding_of_kind(name, x)
                continue
            x = x if x.requires_grad else variable(x)
            copy = x.clone()
            capture.entries[name], capture.of_batch[name] = x, copy
            capture.batch_paths[name] = path
            call = call.with_batch(replaced(call.batch, path, copy))
        return call

    def with_entries(
        self, call: StepCall, needs: Needs, xs: Sequence[Tensor], paths: Any, index: int
    ) -> tuple[StepCall, Any]:
        """Return a step with other inputs by name in its batch, and replacements of the others."""
        found = list(zip(needs.names, xs, paths, strict=True))
        of_batch = {path: x.clone() for _, x, path in found if path is not None}
        of_call = {("", n): (partial(_instead, x), index) for n, x, path in found if path is None}
        return call.with_batch(moved_to(call.batch, of_batch)), of_call

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


def _instead(x: Tensor, _: Tensor) -> Tensor:
    return x


def losses_of(losses: Losses | None, output: Any, capture: Capture, batch: Any) -> Tensor | None:
    """Return the loss of each sample ``[B]`` or step ``[B, T]``, if the step shows them.

    Args:
        losses: where, see `PenalizedNet`.
        output: of the training step.
        capture: what was captured in it.
        batch: of the step.

    Returns:
        The losses; None if ``losses`` is None.

    Raises:
        TypeError: if they are not there.
        ValueError: if they are one number, or have no graph.
    """
    if losses is None:
        return None
    if callable(losses):
        found = losses(capture.output, batch)
    else:
        entries = output if isinstance(output, Mapping) else {}
        if losses not in entries:
            kind = f"a dict with {list(entries)}" if entries else f"a {type(output).__name__}"
            raise TypeError(
                f"`losses={losses!r}` is an entry of what training_step returns, which is {kind}"
                f"{checks.nearest(losses, map(str, entries))}: return {{'loss': ..., {losses!r}: "
                "losses}, or give a function of the net's output and the batch"
            )
        found = entries[losses]
    if not isinstance(found, Tensor) or found.ndim == 0:
        got = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"`losses=...` must be the loss of each sample, [B], or step, [B, T]; got {got}: use "
            'reduction="none"'
        )
    if not found.requires_grad:
        raise ValueError("`losses=...` has no graph: return the losses before .detach() or .item()")
    return found


def probe_spec(needs: Iterable[Needs], *, of_output: bool = False) -> ProbeSpec:
    """Return what a probe has to capture for penalties with these needs.

    Args:
        needs: of the penalties.
        of_output: whether the losses of the samples are a function of the output.

    Returns:
        What to capture.
    """
    needs = list(needs)
    named = [a for n in needs if not n.calls_net for a in n.activations]
    return ProbeSpec(
        order=max((n.order for n in needs), default=0),
        x=any(n.reads_input and not n.names for n in needs),
        output=any(
            n.reads_output or (of_output and n.sample_losses) or (n.calls_net and n.names)
            for n in needs
        ),
        activations=tuple(dict.fromkeys(named)),
        moves=any(n.runs_again and not n.in_weights for n in needs),
        entries=tuple(dict.fromkeys(name for n in needs for name in n.names)),
    )


def differentiated(needs: Needs, capture: Capture, loss: Tensor | None, batch: Any) -> Any:
    """Return what a penalty differentiates: an activation, the output of the net, or the loss.

    The loss is that of each sample, if it is needed and the step shows it.

    Args:
        needs: of the penalty.
        capture: what was captured in the step.
        loss: of the step.
        batch: of the step; it may have weights of the steps of losses.

    Returns:
        What it differentiates.
    """
    if needs.differentiates == "activation":
        return capture.activations.get(needs.activations[0])
    if needs.sample_losses and needs.given_losses:
        assert capture.losses is not None
        keys = [pair for pair in needs.given if needs.weighs_steps and pair[0] == "sample_weight"]
        weights: Any = entries(keys, batch).get("sample_weight")
        weights = weights if has_steps(weights) else None
        return of_each_sample(capture.losses, weights, "let losses=... give them")
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
