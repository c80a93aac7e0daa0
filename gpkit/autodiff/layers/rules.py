"""The gradient in each parameter of a layer, from its input a and δ = ∂L/∂z of its output z."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from gpkit.autodiff.compat import parameters_of
from gpkit.autodiff.layers.gram import Direct, Outer, Part, Product, gram_is_cheaper
from gpkit.autodiff.layers.recording import LayerCall
from gpkit.autodiff.numerics import widened

Parts = Iterator[tuple[str, Part]]  # of a parameter by its name in the layer
Rule = Callable[[Any, Tensor, Tensor], Parts]

RULES: dict[type[nn.Module], Rule] = {}


def rule(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Return a decorator that makes a function the rule of layers of exactly these classes."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def has_rule(layer: nn.Module) -> bool:
    """Whether the gradient of every parameter of a layer is known, for each sample."""
    # A layer that is pruned, or has a weight norm, computes its weight from others.
    known = type(layer) in RULES and parameters_of(layer).keys() <= {"weight", "bias"}
    if isinstance(layer, nn.Embedding):
        return known and layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse)
    if isinstance(layer, CONVOLUTIONS):
        return known and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, BATCH_NORMS):
        return known and not layer.training and layer.running_mean is not None
    if isinstance(layer, INSTANCE_NORMS):
        return known and not layer.track_running_stats
    return known


def parts_of(call: LayerCall, delta: Tensor) -> Parts:
    """Yield the name and the gradient of each parameter of a layer, for each sample.

    Args:
        call: of a layer that `has_rule`.
        delta: δ, the gradient of the loss in its output.

    Yields:
        The name of a parameter, and its gradient in each of the B samples.
    """
    yield from RULES[type(call.layer)](call.layer, call.a, delta)


def positions(x: Tensor) -> Tensor:
    """Return ``[B, *T, n]`` as ``[B, T, n]``."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


@rule(nn.Linear)
def _linear(layer: nn.Linear, a: Tensor, delta: Tensor) -> Parts:
    if delta.ndim == 2:
        yield "weight", Product(delta, a)
    else:
        delta = positions(delta)
        a = a.reshape(*delta.shape[:2], layer.in_features)
        yield "weight", Outer(delta, a, layer.out_features)
        delta = delta.sum(1) if layer.bias is not None else delta
    if layer.bias is not None:
        yield "bias", Direct(delta)


@rule(nn.Embedding)
def _embedding(layer: nn.Embedding, a: Tensor, delta: Tensor) -> Parts:
    ids = a.reshape(len(a), -1)
    delta = delta.reshape(*ids.shape, layer.embedding_dim)
    if layer.padding_idx is not None:
        delta = delta * (ids != layer.padding_idx).unsqueeze(-1)
    yield "weight", Outer(ids, delta, layer.num_embeddings)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@rule(*CONVOLUTIONS)
def _convolution(layer: Any, a: Tensor, delta: Tensor) -> Parts:
    batch, places = len(a), delta.flatten(2)  # [B, p, L]
    outputs, size = len(layer.weight), math.prod(layer.weight.shape[1:])
    if a.ndim == 4 and layer.groups == 1 and gram_is_cheaper(batch, places.shape[2], outputs, size):
        windows = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        yield "weight", Outer(places.transpose(1, 2), windows.transpose(1, 2), outputs)
    else:  # one convolution, in which each sample is a group
        if a.device.type == "cpu":  # which has no kernel of it in half precision
            a, delta = widened(a), widened(delta)
        gradient = WEIGHT_GRADIENTS[a.ndim - 2](
            a.reshape(1, -1, *a.shape[2:]),
            [batch * outputs, *layer.weight.shape[1:]],
            delta.reshape(1, -1, *delta.shape[2:]),
            layer.stride,
            layer.padding,
            layer.dilation,
            batch * layer.groups,
        )
        yield "weight", Direct(gradient.reshape(batch, -1))
    if layer.bias is not None:
        yield "bias", Direct(places.sum(2))


@rule(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(layer: Any, a: Tensor, delta: Tensor) -> Parts:
    shape = list(layer.normalized_shape)
    if isinstance(layer, nn.RMSNorm):
        normalised = F.rms_norm(a, shape, None, layer.eps)
    else:
        normalised = F.layer_norm(a, shape, None, None, layer.eps)
    flat = [t.reshape(len(a), -1, math.prod(shape)) for t in (delta * normalised, delta)]
    yield "weight", Direct(flat[0].sum(1))
    if getattr(layer, "bias", None) is not None:
        yield "bias", Direct(flat[1].sum(1))


INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@rule(nn.GroupNorm, *INSTANCE_NORMS)
def _group_norm(layer: Any, a: Tensor, delta: Tensor) -> Parts:
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else a.shape[1]
    yield from _channels(layer, F.group_norm(a, groups, None, None, layer.eps), delta)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@rule(*BATCH_NORMS)
def _batch_norm(layer: Any, a: Tensor, delta: Tensor) -> Parts:
    mean, var = layer.running_mean, layer.running_var
    yield from _channels(layer, F.batch_norm(a, mean, var, eps=layer.eps), delta)


def _channels(layer: Any, normalised: Tensor, delta: Tensor) -> Parts:
    """Yield the gradients of a scale and a shift for each channel of ``[B, C, *S]``."""
    yield "weight", Direct(per_channel(delta * normalised))
    if layer.bias is not None:
        yield "bias", Direct(per_channel(delta))


def per_channel(x: Tensor) -> Tensor:
    """Return the sum of ``[B, C, *S]`` over all pixels, ``[B, C]``."""
    return x.reshape(*x.shape[:2], -1).sum(2)
