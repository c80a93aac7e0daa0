"""Does the output of a sample depend on the other samples of the batch, as with batch norm?"""

from __future__ import annotations

import warnings

import torch

from gpkit.autodiff import graph
from gpkit.autodiff.compat import uses_batch_statistics
from gpkit.autodiff.derivatives import first_gradients
from gpkit.estimators.base import Target
from gpkit.finding import Finding, FoundError, FoundWarning
from gpkit.formula import Terms

UNTRAINED = "the penalty does not depend on any trained parameter: "
OTHERWISE = (
    "does a layer compare samples, or is the batch not the first dimension, as with time-major "
    "inputs, wrt=gpkit.inputs(batch_dim=1)?"
)


def require_independent_samples(target: Target, terms: Terms) -> None:
    """Warn if the output of one sample depends on another sample, as with batch norm.

    Raises:
        FoundError: if the gradient of the sum over the batch is zero because of it, as with batch
            norm before the last linear layer.
    """
    groups = len(target.y) if target.batched and target.y.ndim else 0
    if groups < 2 or target.mean or any(x.shape[:1] != (groups,) for x in target.xs):
        return
    if not all(x.requires_grad for x in target.xs):  # no gradient is taken in them
        return
    # Of about half of the samples, in no regular order; and with unequal weights of the outputs,
    # because the sum of some, such as of a softmax, is a constant.
    chosen = torch.tensor([i.bit_count() % 2 == 1 for i in range(groups)], device=target.y.device)
    weights = torch.linspace(1, 2, target.y.shape[1], device=target.y.device, dtype=target.y.dtype)
    found = first_gradients((target.y * weights)[chosen], target.xs)
    grads = [g.detach() for g in found if g is not None]
    own = sum(float(g[chosen].abs().sum()) for g in grads)
    others = sum(float(g[~chosen].abs().sum()) for g in grads)
    if not others > 1e-5 * own:
        return
    batch_norm = any(uses_batch_statistics(node, node.name()) for node in graph.nodes(target.y))
    vanishes = float(terms.norms.detach().max()) < 1e-4 * own
    finding = coupled_samples(batch_norm=batch_norm, vanishes=vanishes)
    if vanishes:
        raise FoundError(finding)
    warnings.warn(FoundWarning(finding), stacklevel=2)


def coupled_samples(*, batch_norm: bool, vanishes: bool = False) -> Finding:
    """Return the finding of a net in which the output of one sample depends on another sample.

    Args:
        batch_norm: whether batch norm in training mode is the cause.
        vanishes: whether the gradient of the batch's sum is zero because of it.
    """
    cause = "batch norm is in training mode" if batch_norm else OTHERWISE
    said = f"the outputs of a batch depend on each other ({cause})"
    fix = 'use forward="eval", net.eval(), or group norm or layer norm'
    if vanishes:
        why = f"{UNTRAINED}{said}, and the gradient of their sum is zero"
        return Finding("coupled-samples", "error", why, fix)
    effect = "each norm is of the gradient of the batch's sum, not of the sample's own output"
    return Finding("coupled-samples", "warning", f"{said}: {effect}", fix)
