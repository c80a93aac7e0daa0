"""The penalised loss as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit import formula
from gpkit.autodiff.compat import traces_gradients, tracing_gradients
from gpkit.autodiff.random import SeededDraws
from gpkit.axes.call import Call
from gpkit.axes.form import running_average
from gpkit.needs import needs_of
from gpkit.penalty import Penalty

# What is traced: (x, y, seeds) -> loss, and (n², values, their mean or maximum) by name.
Parts = dict[str, tuple[Tensor, Tensor, Tensor]]
Computed = tuple[Tensor, Parts]


class CompiledLoss:
    """Compiles a loss with its penalties, once for every set of penalties that act together.

    A compiled net has no double backward, but a graph that holds the inner gradient as well as the
    forward has a compiled backward: so the loss and its penalties are traced in one piece.

    Args:
        forward: ``(x, y) -> (what penalties differentiate, by name, and the loss)``.
        penalties: by name; each is taken at ``x`` itself, or in the weights.
        net: the module whose weights they may ask for.

    Raises:
        ValueError: if a penalty evaluates the net at other points, whose forward would leave
            traces: those need the net outside of a compiled graph; or if its weight measures
            gradients.
        RuntimeError: if this torch cannot trace a gradient.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Any], tuple[Mapping[str, Tensor], Tensor]],
        penalties: Mapping[str, Penalty],
        net: torch.nn.Module,
    ) -> None:
        for name, penalty in penalties.items():
            found = refusal(penalty)
            if found:
                takes, is_not = found
                raise ValueError(
                    f"`compile=True` takes {takes}; {name!r} {is_not}: leave compile=False"
                )
        if not traces_gradients():
            raise RuntimeError(
                "`compile=True` needs a torch that can trace gradients (2.13 can); this is "
                f"{torch.__version__}: leave compile=False"
            )
        self.forward = forward
        self.penalties = penalties
        self.net = net
        self._graphs: dict[tuple[str, ...], Callable[..., Computed]] = {}

    def __call__(self, x: Tensor, y: Any, seeds: dict[str, Tensor]) -> Computed:
        """Return the loss without penalties, and n², values and their total by name.

        Args:
            x: ``[B, *S]``, which requires grad if a penalty differentiates in it.
            y: the target.
            seeds: of the random numbers of the penalties that act, each a tensor.

        Returns:
            The loss, and for each penalty n² ``[G]``, values ``[G]`` and their total, unweighted.
        """
        acting = tuple(seeds)
        if acting not in self._graphs:
            # Parameters are found by name, which is nothing to trace.
            variables = {n: p.wrt.chosen(self.net) for n, p in self._in_weights(acting)}
            compute = partial(self._compute, variables)
            self._graphs[acting] = torch.compile(compute, fullgraph=True)
        with tracing_gradients():
            return self._graphs[acting](x, y, seeds)

    def _in_weights(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        return ((n, self.penalties[n]) for n in names if needs_of(self.penalties[n]).in_weights)

    def _compute(
        self,
        variables: Mapping[str, tuple[Tensor, ...]],
        x: Tensor,
        y: Any,
        seeds: dict[str, Tensor],
    ) -> Computed:
        outputs, loss = self.forward(x, y)
        parts: Parts = {}
        for name, seed in seeds.items():
            penalty: Any = self.penalties[name]
            call = Call(penalty, outputs[name], (), None, None, SeededDraws(seed), 0)
            xs = variables.get(name, (x,))
            targets = penalty.wrt.targets_of(call.selected(call.f), xs, penalty)
            n2 = formula.squared_norms(penalty, targets, call.rng)
            term = formula.terms(penalty, n2, 1.0)
            parts[name] = term.squared_norms, term.values, term.reduced
        return loss, parts

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled graphs behind: another process compiles its own."""
        return {**self.__dict__, "_graphs": {}}


def refusal(penalty: Penalty) -> tuple[str, str] | None:
    """Return what can be compiled with the loss, and how a penalty differs; None if it can."""
    needs, axes = needs_of(penalty), penalty.axes()
    if needs.environments:
        return "no environments", "compares some"
    if not needs.reuses_graph:
        return (
            "penalties of one graph",
            f"evaluates the net at other points, by {axes['estimator']!r}",
        )
    if needs.moves:
        return "penalties at the data or in the weights", f"is at {axes['at']!r}"
    if needs.measures:
        return "weights that follow from the step", f"measures two gradients, {axes['weight']!r}"
    if needs.activations:
        return "no named activation", "has one"
    if isinstance(getattr(axes["form"], "center", None), running_average):
        return "no running average", "has one"
    return None
