"""The penalised loss as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from gpkit import captures
from gpkit.averages import running_average
from gpkit.draws import SeededDraws
from gpkit.environments import EnvironmentPenalty
from gpkit.penalty import GradientPenalty
from gpkit.sampled import sampled_losses
from gpkit.targets import Target
from gpkit.variables import weights

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
        penalties: Mapping[str, GradientPenalty],
        net: torch.nn.Module,
    ) -> None:
        for name, penalty in penalties.items():
            if not penalty.estimator.reuses_graph:
                raise ValueError(
                    f"`compile=True` takes penalties of one graph; {name!r} evaluates the net at "
                    f"other points, by {penalty.estimator!r}: leave compile=False"
                )
            if not isinstance(penalty.wrt, weights) and penalty.at.moves:
                raise ValueError(
                    f"`compile=True` takes penalties at the data or in the weights; {name!r} is at "
                    f"{penalty.at!r}: leave compile=False"
                )
            if isinstance(penalty, EnvironmentPenalty):
                raise ValueError(
                    f"`compile=True` cannot trace environments, as {name!r} has them: leave "
                    "compile=False"
                )
            if hasattr(penalty.weight, "measure"):
                raise ValueError(
                    f"`compile=True` traces one backward; the weight of {name!r} takes two more to "
                    f"measure, {penalty.weight!r}: leave compile=False"
                )
            if captures.names(penalty.of, penalty.wrt):
                raise ValueError(
                    f"`compile=True` takes no named activation; {name!r} has one: leave "
                    "compile=False"
                )
            if isinstance(getattr(penalty.form, "center", None), running_average):
                raise ValueError(
                    f"`compile=True` takes no running average; {name!r} has one: leave "
                    "compile=False"
                )
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            raise RuntimeError(
                "`compile=True` needs a torch that can trace gradients (2.13 can); this is "
                f"{torch.__version__}: leave compile=False"
            )
        self.forward = forward
        self.penalties = penalties
        self.net = net
        self.parameters: dict[str, tuple[Tensor, ...]] = {}
        self._compiled: dict[tuple[str, ...], Callable[..., Computed]] = {}

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
        if acting not in self._compiled:
            for name in acting:
                wrt = self.penalties[name].wrt
                if isinstance(wrt, weights):
                    self.parameters[name] = wrt.chosen(self.net)
            self._compiled[acting] = torch.compile(self._compute, fullgraph=True)
        # The limit counts the graphs of all modules in the process, as those of a sweep.
        with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=256):
            return self._compiled[acting](x, y, seeds)

    def _compute(self, x: Tensor, y: Any, seeds: dict[str, Tensor]) -> Computed:
        outputs, loss = self.forward(x, y)
        parts: Parts = {}
        for name, seed in seeds.items():
            penalty, rng = self.penalties[name], SeededDraws(seed)
            y = penalty.of(outputs[name]) if callable(penalty.of) else outputs[name]
            if penalty.of == "sampled_loss":
                y = sampled_losses(y, rng)
            if isinstance(penalty.wrt, weights):
                groups = penalty.wrt.groups(y, penalty.of, penalty.scope)
                targets = [Target(g, self.parameters[name], batched=False) for g in groups]
            else:
                column = penalty.wrt.columns(y, len(x), penalty.of)
                pixels = penalty.scope == "pixel"
                targets = [Target(column, (x,), batched=True, pixels=pixels)]
            n2, values = penalty.measure(targets, rng)
            parts[name] = n2, values, penalty.total(values)
        return loss, parts

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled graphs behind: another process compiles its own."""
        return {**self.__dict__, "_compiled": {}, "parameters": {}}
