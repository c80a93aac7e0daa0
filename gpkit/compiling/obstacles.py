"""Why a loss cannot be compiled: what is known before, and what torch says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.autodiff.compat import class_of
from gpkit.autodiff.derivatives import MENDED, WRONG_TWICE
from gpkit.autodiff.tracing.calls import PenaltyCall
from gpkit.environment_penalty import EnvironmentPenalty
from gpkit.estimators.curvature_difference import curvature_difference
from gpkit.estimators.finite_difference import finite_difference
from gpkit.gradient_penalty import GradientPenalty
from gpkit.needs import needs_of

HERE = str(Path(__file__).parents[1])
TORCH = str(Path(torch.__file__).parent)
VALUES = "what it looks up in a batch, such as its environments, differs from step to step"
CHANGES = (
    "what it runs differs from step to step, such as the net or the penalties: compile one loss "
    "for each, and count outside of it"
)
HINTS = {
    "requires_grad_() called on it": "give the penalty the function, penalty(net, x), or call "
    "x.requires_grad_() before the step",
}


def of_modules(family: Iterable[nn.Module]) -> str | None:
    """Return the recurrent net among modules, if there is one: torch.compile traces none."""
    found = next((m for m in family if isinstance(m, nn.RNNBase)), None)
    if found is None:
        return None
    return f"torch.compile does not trace recurrent nets, as nn.{type(found).__name__}"


def of_graph(total: Tensor, calls: Iterable[PenaltyCall]) -> str | None:
    """Return an operation whose second derivative gpkit can only mend outside of a graph."""
    wrong = set(MENDED)
    own = [call.penalty for call in calls if call.acts]
    if not any(needs_of(p).in_weights for p in own if isinstance(p, GradientPenalty)):
        wrong.discard(WRONG_TWICE)  # it is wrong in the weights alone
    found = next((n.name() for n in graph.nodes(total) if class_of(n) in wrong), None)
    return found and (
        f"torch's second derivative of {found} is wrong, and gpkit can only replace it outside of "
        "a compiled graph"
    )


def of_penalty(penalty: Any) -> str | None:
    """Return why a penalty cannot be in a graph, after its name; None if it can, as is known."""
    if not isinstance(penalty, (GradientPenalty, EnvironmentPenalty)):
        return None  # of a class of one's own; the comparison with the eager step will tell
    needs, axes = needs_of(penalty), penalty.axes()
    estimator, said = axes.get("estimator"), None
    if isinstance(estimator, (finite_difference, curvature_difference)):
        said = (
            f"takes differences, by {type(estimator).__name__}, which need no double backward: "
            "torch.compile the net alone"
        )
    elif needs.pooled:
        said = f"averages gradients first, by scope={axes['scope']!r}"
    return said


def of_calls(calls: Sequence[PenaltyCall]) -> str | None:
    """Return what stops the calls of a step together."""
    for i, call in enumerate(calls):
        state = "average" if call.learns else "weight" if call.penalty.adapts else ""
        if state and any(call.penalty is other.penalty for other in calls[:i]):
            return (
                f"{call.penalty.name!r} is called twice in a step, and the second call reads the "
                f"{state} that the first one updates: give each call a penalty of its own"
            )
    return None


def of_error(error: BaseException) -> str:
    """Return what torch.compile said, in one line, with the line of the user's code."""
    said = str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    detail = next((s for s in lines if s.startswith("Developer debug context: ")), "")
    detail = detail.removeprefix("Developer debug context: ")
    detail = detail or "".join(re.findall(r"got \w+Error\(['\"](.*?)(?=['\"\\]|$)", said)[:1])
    frames = re.findall(r'File "([^"]+)", line (\d+)', said.partition("from user code")[2])
    frames = [(f, n) for f, n in frames if not f.startswith((TORCH, HERE))] or frames
    where = f", {Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""
    hint = next((f": {hint}" for words, hint in HINTS.items() if words in said), "")
    detail = f" [{detail[:200]}]" if detail else ""
    return f"torch.compile says: {first[:300]}{detail}{where}{hint}"
