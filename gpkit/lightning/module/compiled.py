"""The loss and its penalties as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.compat import class_of, traces_gradients, tracing_gradients
from gpkit.autodiff.derivatives import WRONG_TWICE
from gpkit.autodiff.random import SeededDraws
from gpkit.axes.average import running_average
from gpkit.axes.call import Call
from gpkit.formula import Terms
from gpkit.needs import needs_of
from gpkit.penalty import Penalty

# The compiled function: (x, y, seeds) -> the loss, and by penalty n², values and their reduction.
Parts = dict[str, tuple[Tensor, Tensor, Tensor]]
LossAndParts = tuple[Tensor, Parts]


class CompiledLoss:
    """Compiles a loss together with its penalties.

    ``torch.compile`` has no double backward. But a graph that contains both the forward pass and
    the inner gradient needs only a single backward, so the loss and its penalties are traced as one
    graph. There is one graph for each set of penalties that act together.

    Args:
        forward: ``(x, y) -> (outputs, loss)``, where ``outputs`` holds what each penalty
            differentiates, by name.
        penalties: by name; each is in the inputs at the data, or in the weights.
        net: the module whose weights the penalties are in.

    Raises:
        ValueError: if a penalty cannot be in the graph: it runs a forward pass of its own, compares
            environments, names an activation, has a weight that measures gradients, or a form with
            a running average.
        RuntimeError: if this version of torch cannot trace a gradient.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Any], tuple[Mapping[str, Tensor], Tensor]],
        penalties: Mapping[str, Penalty],
        net: torch.nn.Module,
    ) -> None:
        for name, penalty in penalties.items():
            reason = not_compiled_because(penalty)
            if reason:
                raise ValueError(
                    f"`compile=True` does not support {name!r}, which {reason}: leave compile=False"
                )
        if not traces_gradients():
            raise RuntimeError(
                "`compile=True` needs a version of torch that can trace gradients, such as 2.13; "
                f"got {torch.__version__}: leave compile=False"
            )
        self.forward = forward
        self.penalties = penalties
        self.net = net
        self._graphs: dict[tuple[str, ...], Callable[..., LossAndParts]] = {}

    def __call__(
        self, x: Tensor, y: Any, seeds: dict[str, Tensor], scale: Tensor | None = None
    ) -> LossAndParts:
        """Return the loss without penalties, and the parts of each penalty that acts.

        Args:
            x: ``[B, *S]``; it must require grad if a penalty differentiates in it.
            y: the target.
            seeds: the seed of each penalty that acts, by name, each an integer tensor.
            scale: the factor of a gradient scaler, for the gradients inside of the penalties.

        Returns:
            The loss; and for each penalty n² ``[G]``, the values ``[G]`` and their mean or maximum,
            not weighted.
        """
        acting = tuple(seeds)
        if acting not in self._graphs:
            # Outside of the graph: parameters are chosen by name, which cannot be traced.
            variables = {n: p.wrt.chosen(self.net) for n, p in self._in_weights(acting)}
            compute = partial(self._compute, variables)
            self._graphs[acting] = torch.compile(compute, fullgraph=True)
        with tracing_gradients():
            return self._graphs[acting](x, y, seeds, scale)

    def require_derivatives(self, loss: Tensor) -> None:
        """Refuse a loss, of a step that is not compiled, whose compiled derivatives are wrong.

        Raises:
            ValueError: if a penalty is in the weights of a net with weight norm: torch's second
                derivative of it is wrong, and cannot be replaced inside of a compiled graph.
        """
        found = next((n.name() for n in graph.nodes(loss) if class_of(n) == WRONG_TWICE), None)
        for name, _ in self._in_weights(self.penalties) if found else ():
            raise ValueError(
                f"`compile=True` does not support {name!r} with weight norm ({found}): torch's "
                "second derivative of it is wrong, and gpkit can only replace it outside of a "
                "compiled graph: leave compile=False"
            )

    def _in_weights(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        return ((n, self.penalties[n]) for n in names if needs_of(self.penalties[n]).in_weights)

    def _compute(
        self,
        variables: Mapping[str, tuple[Tensor, ...]],
        x: Tensor,
        y: Any,
        seeds: dict[str, Tensor],
        scale: Tensor | None,
    ) -> LossAndParts:
        outputs, loss = self.forward(x, y)
        parts: Parts = {}
        for name, seed in seeds.items():
            penalty: Any = self.penalties[name]
            call = Call(penalty, outputs[name], (), None, None, SeededDraws(seed), 0)
            xs = variables.get(name, (x,))
            targets = penalty.wrt.targets_of(call.selected(call.f), xs, penalty)
            n2 = formula.squared_norms(penalty, targets, call.rng, scale)
            term = formula.terms(penalty, n2, 1.0)
            parts[name] = term.squared_norms, term.values, term.reduced
        return loss, parts

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the compiled graphs; another process compiles its own."""
        return {**self.__dict__, "_graphs": {}}


def not_compiled_because(penalty: Penalty) -> str | None:
    """Return the reason why a penalty cannot be compiled with the loss; None if it can."""
    needs, axes = needs_of(penalty), penalty.axes()
    if needs.environments:
        return "compares environments"
    if needs.own_forward:
        return f"runs the net itself, by forward={axes['forward']!r}"
    if not needs.reuses_graph:
        return f"evaluates the net again, by {axes['estimator']!r}"
    if needs.moves:
        return f"is at {axes['at']!r}, and not at the data"
    if needs.measures:
        return f"has a weight that measures gradients, {axes['weight']!r}"
    if needs.activations or needs.names:
        return "names an activation" if needs.activations else "names entries of the batch"
    if needs.given or axes["metric"]:
        return "compares the derivative with something, or weighs samples"
    if isinstance(getattr(axes["form"], "center", None), running_average):
        return "has a running average"
    return None


def terms_of(parts: Any, weight: float) -> Terms:
    """Return the terms from the output of a compiled graph: n², values and their reduction."""
    n2, values, reduced = parts
    return Terms(n2, values, weight, reduced)
