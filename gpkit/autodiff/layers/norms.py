"""Norms of each sample's gradient in the weights, from one gradient in the outputs of the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import gradients_at
from gpkit.autodiff.layers.gram import Part, squared_norm
from gpkit.autodiff.layers.recording import Recording
from gpkit.autodiff.layers.rules import has_rule, parts_of
from gpkit.autodiff.numerics import wide


def sample_norms(losses: Tensor, parameters: Sequence[Tensor], recording: Recording) -> Tensor:
    """Return ‖∂ℓ_i/∂θ‖² of each sample, from one gradient in the outputs of the layers.

    Args:
        losses: ℓ, ``[B]``; sample i must depend on row i of each layer's input only.
        parameters: θ.
        recording: of the forward pass.

    Returns:
        n² ``[B]``, differentiable, in float32 or better.
    """
    wanted = {id(p) for p in parameters}
    deltas = gradients_at(losses.sum(), [call.z for call in recording.calls])
    parts: dict[int, list[Part]] = {}
    for call, delta in zip(recording.calls, deltas, strict=True):
        if delta is None:
            continue
        for name, part in parts_of(call, delta):
            p = getattr(call.layer, name)
            if id(p) in wanted:
                parts.setdefault(id(p), []).append(part)
    total = losses.new_zeros(len(losses), dtype=wide(losses))
    for group in parts.values():
        total = total + squared_norm(group)
    return total


def refusal(losses: Tensor, parameters: Sequence[Tensor], recording: Recording) -> str:
    """Return why `sample_norms` does not apply to a forward pass; "" if it does.

    Every use of a parameter must be a recorded call of a layer with a rule, on rows of samples.
    """
    if recording.missing:
        return f"the call of {recording.missing[0]!r} has other arguments than one tensor"
    recorded: Counter[int] = Counter()
    for call in recording.calls:
        kind = type(call.layer).__name__
        if not has_rule(call.layer) or "forward" in vars(call.layer):
            return f"there is no rule for {kind}"
        if call.a.ndim < 2 or len(call.a) != len(losses):
            return f"the input of {kind}, {list(call.a.shape)}, has no row for each sample"
        if not call.intact:
            return f"the input of {kind} was modified in place"
        recorded.update(id(p) for p in call.layer.parameters(recurse=False))
    used = graph.uses(losses)
    for p in parameters:
        if used[id(p)] != recorded[id(p)] * (id(p) in used):
            return f"a parameter {list(p.shape)} is used outside of its layer"
    return ""
