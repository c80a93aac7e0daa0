"""What a penalty needs from the code that runs the forward pass.

`PenalizedModule`, `GANModule` and `GradientPenaltyCallback` run the forward pass, and pass each
penalty what it needs. Only this file reads the axes for that purpose.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from gpkit.autodiff import activations
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.axes.at import At, fake, interpolate
from gpkit.axes.mixtures import mixture
from gpkit.axes.parameters import reads_layers
from gpkit.axes.wrt import inputs
from gpkit.environment_penalty import EnvironmentPenalty
from gpkit.estimators.exact import exact
from gpkit.estimators.window import POOLED
from gpkit.gradient_penalty import GradientPenalty
from gpkit.penalty import Penalty


@dataclass(frozen=True)
class Needs:
    """What one penalty needs.

    Args:
        differentiates: "loss", "output", "activation", or "environments".
        in_weights: whether the variables are the parameters.
        in_activation: the names of the activations that are the variables; () if none are.
        activations: the names of the activations used by ``of`` and ``wrt``.
        order: k if kernels need a double backward, else 0.
        moves: whether the points differ from the samples.
        reuses_graph: whether the graph of the training forward pass is enough.
        on_jets: whether the function runs on Taylor series.
        per_sample: whether each sample or pixel has a norm.
        pooled: whether gradients are averaged over micro-batches or ranks before the norm.
        plain: whether it is the exact gradient of the loss, in all weights or in the input.
        layers: whether it reads the inputs and outputs of the layers.
        features: whether it needs the input of the last linear layer.
        reads: the kinds of samples that its points are made of, "real" and "fake".
        samples: the kinds of samples whose scores it starts from; () if it must run the critic
            itself.
        continues: whether it evaluates the function elsewhere then; else their graphs are enough.
        values: whether it takes no gradient in the samples.
        fakes: what to say where there are no fake samples; "" if its points need none.
        measures: whether its weight measures the gradients of loss and penalty.
        given: where the batch has what the call must give, by name, see `GradientPenalty`.
        weighs_steps: whether weights of samples may be those of the steps of their losses.
        names: the entries of a batch that are the variables; () if its first input is.
        own_forward: whether it must run a forward pass of its own, in its own mode.
        part: what to say where a part of the samples would not fit the batch's targets; "" if it
            takes all samples, or runs the net on its own ones.
        takes_part: whether it takes a part of the samples.
        given_losses: whether the loss of each sample is there after the forward pass.
    """

    differentiates: str
    in_weights: bool = False
    in_activation: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    order: int = 0
    moves: bool = False
    reuses_graph: bool = True
    on_jets: bool = False
    per_sample: bool = False
    pooled: bool = False
    plain: bool = False
    layers: bool = False
    features: bool = False
    reads: tuple[str, ...] = ("real", "fake")
    samples: tuple[str, ...] = ()
    continues: bool = False
    values: bool = False
    fakes: str = ""
    measures: bool = False
    given: tuple[tuple[str, Any], ...] = ()
    weighs_steps: bool = False
    names: tuple[str, ...] = ()
    own_forward: bool = False
    part: str = ""
    takes_part: bool = False
    given_losses: bool = False

    @cached_property
    def of_loss(self) -> bool:
        """Whether it differentiates the loss."""
        return self.differentiates == "loss"

    @cached_property
    def environments(self) -> bool:
        """Whether it compares the environments of a batch."""
        return self.differentiates == "environments"

    def with_losses(self) -> Needs:
        """Return the same where the loss of each sample is there after the forward pass."""
        return replace(self, given_losses=True, plain=self.plain and not self.sample_losses)

    @cached_property
    def at_data(self) -> bool:
        """Whether the variables are the input or an activation, in a forward pass at the data."""
        return not (self.in_weights or self.environments or self.moves)

    @cached_property
    def input_graph(self) -> bool:
        """Whether it only needs a forward pass at the data with an input that requires grad."""
        return self.at_data and self.reuses_graph

    @cached_property
    def sample_losses(self) -> bool:
        """Whether it differentiates the loss of each sample."""
        return self.of_loss and self.per_sample

    @cached_property
    def each_gradient(self) -> bool:
        """Whether it differentiates the loss of each sample with respect to the weights."""
        return self.in_weights and self.sample_losses

    @cached_property
    def loss_at_two_points(self) -> bool:
        """Whether it takes finite differences of the loss in the weights, not per sample."""
        once = self.in_weights and self.of_loss and not self.per_sample
        return once and self.order == 0 and not (self.reuses_graph or self.own_forward)

    @cached_property
    def calls_net(self) -> bool:
        """Whether it calls the net itself, at its own points, without the loss."""
        elsewhere = self.moves or self.on_jets
        return not (self.of_loss or self.in_weights or self.environments) and elsewhere

    @cached_property
    def splits_batch(self) -> bool:
        """Whether the loss is computed once for each sample, since there are no losses of them."""
        return self.each_gradient and not self.given_losses

    @cached_property
    def runs_again(self) -> bool:
        """Whether it reruns the loss computation: at other points or weights, or per sample."""
        reruns = self.moves or self.pooled or self.splits_batch or not self.reuses_graph
        return reruns and not self.calls_net

    @cached_property
    def reads_input(self) -> bool:
        """Whether it needs the net's input, as the variable or to compute its points."""
        inside = self.in_weights or self.environments or (self.in_activation and not self.moves)
        return not inside

    @cached_property
    def reads_output(self) -> bool:
        """Whether it differentiates the net's output in the training forward pass."""
        return self.differentiates == "output" and not self.calls_net


def needs_of(penalty: Penalty) -> Needs:
    """Return what a penalty needs from the code that runs the forward pass.

    It is asked at every step, and worked out anew where a choice of the penalty was replaced.

    Args:
        penalty: a `GradientPenalty` or an `EnvironmentPenalty`.

    Returns:
        The needs.
    """
    if isinstance(penalty, EnvironmentPenalty):
        features = penalty.statistic.features
        return Needs("environments", features=features, measures=penalty.measures)
    assert isinstance(penalty, GradientPenalty), penalty
    if TRACES:
        return _worked_out(penalty)
    choices = [*penalty.axes().values(), penalty.given, penalty.metric]
    before, needs = _KNOWN.get(penalty, ([], None))
    same = len(before) == len(choices) and all(map(operator.is_, before, choices))
    if needs is None or not same:
        needs = _worked_out(penalty)
        _KNOWN[penalty] = choices, needs
    return needs


_KNOWN: WeakKeyDictionary[GradientPenalty, tuple[list[Any], Needs]] = WeakKeyDictionary()


def _worked_out(penalty: GradientPenalty) -> Needs:
    of, wrt, estimator = penalty.of, penalty.wrt, penalty.estimator
    in_weights, loss = not wrt.batched, penalty.of == "loss"
    own_forward = penalty.forward != "isolated"
    reuses_graph = estimator.reuses_graph and not own_forward
    continues = estimator.continues and not own_forward
    on_samples = (reuses_graph or continues) and not (in_weights or penalty.named)
    weighs_losses = in_weights and "sample_weight" in penalty.given
    whole = (
        (penalty.scope == "batch" and getattr(wrt, "match", "") == "*")
        if in_weights
        else (penalty.scope == "sample" and wrt == inputs() and not penalty.at.moves)
    )
    return Needs(
        "activation" if isinstance(of, activations.Named) else "loss" if loss else "output",
        in_weights=in_weights,
        in_activation=getattr(wrt, "names", ()),
        activations=penalty.named,
        order=0 if estimator.first_order else penalty.order,
        moves=penalty.at.moves and not in_weights,
        reuses_graph=reuses_graph,
        on_jets=estimator.on_jets,
        per_sample=penalty.scope in ("sample", "pixel") or weighs_losses,
        pooled=penalty.scope in POOLED,
        plain=type(penalty) is GradientPenalty
        and type(estimator) is exact
        and whole
        and loss
        and penalty.order == 1
        and not (own_forward or penalty.given or penalty.metric),
        layers=reads_layers(penalty),
        measures=penalty.measures,
        reads=("real", "fake") if in_weights else penalty.at.reads,
        samples=penalty.at.samples if on_samples else (),
        continues=continues,
        values=not estimator.differentiates,
        fakes=_without_fakes(penalty.at),
        given=tuple(penalty.given.items()),
        weighs_steps=loss and "sample_weight" in penalty.given and penalty.scope != "pixel",
        names=wrt.keys,
        own_forward=own_forward,
        part=_of_a_part(penalty),
        takes_part=penalty.subsample is not None,
    )


def _of_a_part(penalty: GradientPenalty) -> str:
    """Return what to say where a part of the samples would not fit the batch's targets."""
    if penalty.subsample is None or (penalty.wrt.batched and penalty.of != "loss"):
        return ""
    return (
        f"subsample={penalty.subsample} of a penalty of the loss takes some samples, and the loss "
        "here has the targets of all: use every=..., a penalty of the output, or call the penalty "
        "in a loop of your own"
    )


def _without_fakes(at: At) -> str:
    """Return what to say where there are no fake samples; "" if the points need none."""
    if isinstance(at, mixture):
        return next(filter(None, map(_without_fakes, at.ats)), "")
    if not isinstance(at, (interpolate, fake)):
        return ""
    return (
        f"at={type(at).__name__}() needs fake samples, which a training step does not show: use "
        "gpkit.GANModule, or call penalty(critic, real=..., fake=...) in the step"
    )
