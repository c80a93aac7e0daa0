"""Trial: one penalty on one net and batch, evaluated once, for all checks to look at."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.activations import features
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.random import device_of
from gpkit.doctor.example import Example
from gpkit.environment_penalty import EnvironmentPenalty
from gpkit.estimators.base import Target
from gpkit.findings.watch import Watch
from gpkit.formula import Terms
from gpkit.gradient_penalty import GradientPenalty
from gpkit.hints import ExplainedError
from gpkit.losses import logits
from gpkit.needs import Needs, needs_of
from gpkit.penalty import Penalty

SEED = 0
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    NotImplementedError,
    IndexError,
    KeyError,
    AttributeError,
)

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an evaluation of the penalty has given.

    Args:
        terms: of the penalty; None if it failed.
        gradients: of the penalty by the name of the parameter; {} if it failed.
        error: why it failed.
        warned: the warnings that it gave.
    """

    terms: Terms | None
    gradients: Gradients
    error: Exception | None
    warned: tuple[Warning, ...] = ()


@dataclass(eq=False)
class Trial:
    """One penalty, and what it is tried on.

    Args:
        net: a copy of the net.
        name: the name of the penalty.
        penalty: a copy of the penalty.
        example: the batch.
        compiled: the names of the net's compiled modules; the copy is not compiled.
        share: of the loss's gradient, that the suggested weight gives the penalty's.
        costs: whether to measure time and memory.
    """

    net: nn.Module
    name: str
    penalty: Penalty
    example: Example
    compiled: tuple[str, ...] = ()
    share: float = 0.1
    costs: bool = True

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """What the checks have measured."""
        return {}

    @cached_property
    def needs(self) -> Needs | None:
        """What the penalty needs of a forward pass; None if it is a class of the user's own."""
        known = isinstance(self.penalty, (GradientPenalty, EnvironmentPenalty))
        return needs_of(self.penalty) if known else None

    @property
    def preset(self) -> str:
        """The name of the penalty, which is that of its preset unless another one was given."""
        return self.penalty.name

    @property
    def in_input(self) -> bool:
        """Whether the penalty differentiates in the input."""
        needs = self.needs
        return bool(needs) and not (
            needs.in_weights or needs.environments or needs.in_activation  # type: ignore[union-attr]
        )

    @property
    def twice(self) -> int:
        """How many derivatives the training step takes through the net; 1 if it is first order."""
        needs = self.needs
        # Environments are compared by derivatives of the loss in the outputs.
        return 1 if needs is None or needs.environments else needs.order + 1

    @cached_property
    def weight(self) -> float:
        """λ at the first step at which the penalty acts; 1 if it is zero there."""
        return self.penalty.weight_at(0) / self.penalty.every or 1.0

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return device_of(self.net, self.example.x)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that require grad, each once."""
        return {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    # The forward pass.

    @cached_property
    def forward(self) -> tuple[Any, Watch]:
        """The output of a forward pass, and what its modules did."""
        return self.look(SEED)

    def look(self, seed: int, net: nn.Module | None = None) -> tuple[Any, Watch]:
        """Return the output of a forward pass, on a copy of x, and what its modules did."""
        net = self.net if net is None else net
        with isolated(net, seed, self.device, twice=False), torch.no_grad(), Watch(net) as watch:
            output = self.example.run(net, self.example.x.clone())
        return output, watch

    @cached_property
    def loss(self) -> tuple[float, Gradients]:
        """The value of the loss, and its gradient by the name of the parameter."""
        with isolated(self.net, SEED, self.device, twice=False):
            loss = self.example.training_loss(self.net)
            names, params = list(self.parameters), list(self.parameters.values())
            grads: Any = [None] * len(params)
            if params and loss.requires_grad:
                grads = torch.autograd.grad(loss, params, allow_unused=True)
        return float(loss), dict(zip(names, grads, strict=True))

    # The penalty.

    def call(self, net: nn.Module, example: Example) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return how the penalty is called: f, the other arguments, and those by keyword."""
        penalty, needs = self.penalty, self.needs
        if needs is None:
            return example.training_loss(net), (net,), {}
        if isinstance(penalty, EnvironmentPenalty):
            return self._of_environments(net, example, needs.features)
        assert isinstance(penalty, GradientPenalty)
        if needs.in_weights:
            return self._closure(net, example, penalty), (net,), {}
        module = [net] if penalty.named else []
        x, plain = example.x, isinstance(example.inputs, Tensor) and not self.selects
        function: Callable[..., Any] = net if plain else lambda z: self.output(net, example, z)
        if needs.of_loss and (example.y is not None or example.loss is not None):

            def function(z: Tensor) -> Tensor:
                return example.losses_of(example.run(net, z), len(z))

        if penalty.at.moves and "fake" in penalty.at.reads:
            real = x if "real" in penalty.at.reads else None
            return function, tuple(module), {"real": real, "fake": example.fakes}
        if penalty.at.reads == ("fake",):
            return function, (example.fakes, *module), {}
        return function, (x, *module), {}

    @cached_property
    def selects(self) -> bool:
        """Whether the net's output is no tensor and has logits, which are what is meant."""
        of = getattr(self.penalty, "of", None)
        try:
            output, _ = self.forward
        except FAILURES:
            return False
        named = isinstance(self.penalty, GradientPenalty) and self.penalty.named
        if logits(output) is output or named:
            return False
        if callable(of):  # the penalty selects what it differentiates, of the output or of logits
            try:
                of(output)
                return False
            except FAILURES:
                return True
        return True

    def output(self, net: nn.Module, example: Example, z: Tensor | None = None) -> Any:
        """Return what a penalty of the output is given: its logits, as `PenalizedModule` has it."""
        output = example.run(net, z)
        return logits(output) if self.selects else output

    def _closure(
        self, net: nn.Module, example: Example, penalty: GradientPenalty
    ) -> Callable[[], Any]:
        if penalty.of != "loss":  # labels drawn, a function of the output, or an activation
            return lambda: self.output(net, example)
        each = penalty.scope == "sample" or "sample_weight" in example.given

        def closure() -> Tensor:
            output = example.run(net)
            return example.losses_of(output) if each else example.loss_of(output).mean()

        return closure

    def _of_environments(
        self, net: nn.Module, example: Example, with_features: bool
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        env = example.env
        if env is None:  # the two halves of the batch
            env = (torch.arange(len(example.x)) * 2 >= len(example.x)).long()

        def given() -> Any:
            if not with_features:
                return self.output(net, example)
            output, taken = example.run(lambda *a, **k: features(net, *a, **k))
            return logits(output), taken

        return given, (example.y, env.to(self.device)), {}

    def evaluate(
        self, net: nn.Module | None = None, example: Example | None = None, *, acts: bool = False
    ) -> Terms:
        """Return the terms of the penalty, always with the same random numbers."""
        example = example or self.example
        f, args, kinds = self.call(self.net if net is None else net, example)
        penalty = copy.deepcopy(self.penalty)
        options: dict[str, Any] = {"acts": acts}
        if example.given:
            from gpkit.axes.given.given import as_given

            options |= as_given(example.given, penalty)
        real, fake = kinds.get("real"), kinds.get("fake")
        return penalty.evaluate(f, args, real, fake, self.weight, SEED, **options)

    @cached_property
    def outcome(self) -> Outcome:
        """The penalty and its gradient, as a training step takes them."""
        gradients: Gradients = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                terms = self.evaluate(acts=True)
                gradients = self.gradients_of(terms.penalty)
            except FAILURES as error:
                return Outcome(None, {}, error, tuple(_said(caught)))
        return Outcome(terms, gradients, None, tuple(_said(caught)))

    def gradients_of(self, value: Tensor, parameters: dict[str, Tensor] | None = None) -> Gradients:
        """Return the gradient of a penalty by the name of the parameter.

        Raises:
            ExplainedError: if an operation has no second derivative.
        """
        found = self.parameters if parameters is None else parameters
        if not value.requires_grad or not found:
            return dict.fromkeys(found)
        try:
            grads = torch.autograd.grad(
                value, list(found.values()), retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise ExplainedError(error) from error
        return dict(zip(found, grads, strict=True))

    @cached_property
    def graphs(self) -> tuple[list[Target], Watch]:
        """What the penalty differentiates, and the modules that have made it."""
        f, args, kinds = self.call(self.net, self.example)
        penalty = copy.deepcopy(self.penalty)
        rng = torch.Generator(self.device).manual_seed(SEED)
        with Watch(self.net, values=False) as watch:
            if not isinstance(penalty, GradientPenalty):
                with isolated(self.net, SEED, self.device):
                    y = self.example.training_loss(self.net)
                targets = [Target(y.reshape(1, 1), tuple(self.parameters.values()), False)]
            else:
                real, fake = kinds.get("real"), kinds.get("fake")
                targets = penalty.targets(f, args, real, fake, rng, SEED, False, None)
        return targets, watch


def _said(caught: Iterable[warnings.WarningMessage]) -> list[Warning]:
    return [w.message for w in caught if isinstance(w.message, Warning)]


def norm_of(gradients: Iterable[Tensor | None]) -> float:
    """Return the norm of gradients together, in float64."""
    squares = [float(g.detach().double().abs().square().sum()) for g in gradients if g is not None]
    return sum(squares) ** 0.5
