"""Norms of each sample's gradient in the weights, from one gradient in the layers' outputs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.compat import couples_samples, parameters_of
from gpkit.autodiff.derivatives import first_gradients, gradients_at
from gpkit.autodiff.layers.gram import Part, Rows, gram_norm, rows_norm, rows_of
from gpkit.autodiff.layers.recording import Gradients, Recording
from gpkit.autodiff.layers.rules import has_rule, parts_of
from gpkit.autodiff.numerics import as_real, wide, widened


def sample_norms(
    losses: Tensor,
    parameters: Sequence[Tensor],
    recording: Recording,
    by: Gradients = gradients_at,
) -> Tensor:
    """Return ‖∂ℓ_i/∂θ‖² of each sample, from one gradient in the outputs of the layers.

    Args:
        losses: ℓ, ``[B]``; sample i must depend on row i of each layer's input only.
        parameters: θ.
        recording: of the forward pass.
        by: what takes the gradient.

    Returns:
        n² ``[B]``, differentiable, in float32 or better.
    """
    wanted = {id(p) for p in parameters}
    recording.differentiate(losses, by=by)
    parts: dict[int, list[Part]] = {}
    for call in recording.calls:
        if call.delta is None:
            continue
        for name, part in parts_of(call, call.delta):
            own = id(getattr(call.layer, name))  # `parameters_of` is not traced in a graph
            if own in wanted:
                parts.setdefault(own, []).append(part)
    rows: list[Rows] = []
    norms = []
    for group in parts.values():
        pair = rows_of(group)
        if pair is None:
            norms.append(gram_norm(group))
        else:
            rows.append(pair)
    if rows:
        norms.append(rows_norm(rows))
    return sum(norms[1:], norms[0]) if norms else losses.new_zeros(len(losses), dtype=wide(losses))


def applies(recording: Recording, losses: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether `sample_norms` is right for a forward pass. If not, the reason is a warning, once.

    Args:
        recording: of the forward pass.
        losses: ℓ, ``[B]``.
        parameters: θ.

    Returns:
        Whether every use of a parameter is a recorded call of a layer with a rule, on rows of
        samples, and the samples do not depend on each other. The latter is measured in the first
        pass of a net in each mode, and again while layers have no gradient, as before a last layer
        that starts at zero.
    """
    losses = losses.reshape(-1)
    found = _refusal(recording, losses, parameters)
    seen = SEEN.setdefault(recording.net, {})
    if not found:
        agrees = seen.get(mode := recording.net.training)
        if agrees is None:
            agrees = _agrees(recording, losses, parameters)
            if not agrees or _is_telling(recording):
                seen[mode] = agrees
        found = "" if agrees else "the samples depend on each other"
    if found and "warned" not in seen:
        seen["warned"] = True
        warnings.warn(
            f"the norms of each sample's gradient take a backward pass for each sample: {found}",
            stacklevel=2,
        )
    return not found


# What is known of a net: whether `sample_norms` was right in training and in eval mode.
SEEN: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


def is_proven(net: Any) -> bool:
    """Whether `sample_norms` was seen to be right for a net in its mode."""
    return SEEN.get(net, {}).get(net.training, False)


def _is_telling(recording: Recording) -> bool:
    """Whether each layer has a gradient in the first or the last sample, of which norms agree."""
    deltas = [call.delta for call in recording.calls if call.delta is not None]
    return all(bool(delta[[0, -1]].any()) for delta in deltas)


def _agrees(recording: Recording, losses: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the norms of the first and the last sample are those of their own gradients."""
    n2 = sample_norms(losses, parameters, recording).detach()
    dtypes = {losses.dtype, *(call.dtype for call in recording.calls)}
    # Other devices than a CPU compute in coarser numbers than they show, such as TF32.
    fine = losses.device.type == "cpu" and dtypes <= {torch.float32, torch.float64}
    close = 1e-3 if fine else 1e-2
    for i in (0, -1):
        grads = first_gradients(losses[i], tuple(parameters))
        own = sum(as_real(widened(g)).square().sum() for g in grads if g is not None)
        if not torch.allclose(n2[i], torch.as_tensor(own).to(n2), rtol=close, atol=1e-30):
            return False
    return True


def _refusal(recording: Recording, losses: Tensor, parameters: Sequence[Tensor]) -> str:
    """Return why `sample_norms` does not apply, as far as the graph shows it; "" if it does."""
    if recording.missing:
        return f"{recording.missing[0]} was called with other arguments than one tensor"
    recorded: Counter[int] = Counter()
    for call in recording.calls:
        kind = type(call.layer).__name__
        if not has_rule(call.layer) or "forward" in vars(call.layer):
            return f"{kind} has no rule for them"
        if call.a.ndim < 2 or len(call.a) != len(losses):
            return f"the input of {kind}, {list(call.a.shape)}, has no row for each sample"
        if not call.intact:
            return f"the input of {kind} was modified in place"
        recorded.update([id(p) for p in parameters_of(call.layer).values() if p is not None])
    if any(map(couples_samples, graph.nodes(losses))):
        return "the samples depend on each other, by batch norm in training mode"
    used = graph.uses(losses)
    for p in parameters:
        if id(p) in used and used[id(p)] != recorded[id(p)]:
            return f"a parameter {list(p.shape)} is used outside of a layer's own call"
    return ""
