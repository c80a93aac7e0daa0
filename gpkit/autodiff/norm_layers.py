"""Layer, batch and instance norm in elementary operations, for derivatives of order 3 and above.

The third derivatives of torch's fused layer norm, and of its batch norm in training mode (instance
norm uses it), are wrong, without an error (pytorch#175754). Elementary operations have correct
derivatives of all orders. Training with a penalty of order k needs order k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpkit.autodiff.numerics import wide, widened
from gpkit.autodiff.tracing.compat import traceable


class elementary(TorchFunctionMode):
    """A context that computes norm layers in elementary operations: ``with elementary(): net(x)``.

    It applies to layer, RMS, batch and instance norm, as modules and as functions. Outputs and
    running statistics equal torch's up to rounding. Invalid arguments get torch's own errors.

    >>> import gpkit
    >>> net = torch.nn.Sequential(torch.nn.LayerNorm(2, eps=0), torch.nn.Flatten(0)).double()
    >>> x = torch.tensor([[3.0, 1.0]]).double().requires_grad_()  # -> (x₀ - x₁) / |x₀ - x₁| = ±1
    >>> with elementary():
    ...     y = net(x)[:1]
    >>> bool(gpkit.derivative(y, x, order=3).abs().max() < 1e-12)
    True
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the elementary version of a norm; call any other function unchanged."""
        kwargs = kwargs or {}
        written = WRITTEN_OUT.get(func)
        found = written(*args, **kwargs) if written else NotImplemented
        return traceable(func)(*args, **kwargs) if found is NotImplemented else found


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """Return w (x - m) / √(v + ε) + b, m and v over the last dimensions; torch.layer_norm."""
    out = native_layer_norm(input, normalized_shape, weight, bias, eps)
    return out if out is NotImplemented else out[0]


def native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    """Return the layer norm, m and 1/√(v + ε); torch.native_layer_norm."""
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        return NotImplemented
    if not all(suits(p, shape, input) for p in (weight, bias)):
        return NotImplemented
    dims = tuple(range(-len(shape), 0))
    x = widened(input)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return affine(centred * rstd, weight, bias).to(autocast_dtype(input)), mean, rstd


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Return w x / √(mean x² + ε), the mean over the last dimensions; torch.rms_norm."""
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape or not suits(weight, shape, input):
        return NotImplemented
    x = widened(input)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    mean_square = x.square().mean(tuple(range(-len(shape), 0)), keepdim=True)
    return affine(x * (mean_square + eps).rsqrt(), weight, None).to(autocast_dtype(input))


def functional_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Return the batch norm; torch.nn.functional.batch_norm."""
    return batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    """Return the batch norm; torch.batch_norm."""
    out = native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return out if out is NotImplemented else out[0]


def native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Return w (x - m) / √(v + ε) + b over batch and space, m, and 1/√(v + ε)."""
    # In eval mode m and v are constants, and the fused derivatives are correct.
    if not training or input.ndim < 2 or input.numel() <= input.shape[1] or eps <= 0:
        return NotImplemented
    channels = (input.shape[1],)
    if not all(suits(p, channels, input) for p in (weight, bias, running_mean, running_var)):
        return NotImplemented
    dims = (0, *range(2, input.ndim))
    out, mean, var, rstd = normalized(input, weight, bias, dims, eps)
    count = input.numel() // input.shape[1]
    update(running_mean, mean.flatten(), momentum)
    update(running_var, var.flatten() * (count / (count - 1)), momentum)
    return out, mean.flatten(), rstd.flatten()


def functional_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Return the instance norm; torch.nn.functional.instance_norm."""
    return instance_norm(
        input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, True
    )


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """Return w (x - m) / √(v + ε) + b over the space of each sample; torch.instance_norm."""
    count = math.prod(input.shape[2:])
    if not use_input_stats or input.ndim < 3 or count <= 1 or len(input) == 0:
        return NotImplemented
    channels = (input.shape[1],)
    if not all(suits(p, channels, input) for p in (weight, bias, running_mean, running_var)):
        return NotImplemented
    out, mean, var, _ = normalized(input, weight, bias, tuple(range(2, input.ndim)), eps)
    update(running_mean, mean.flatten(1).mean(0), momentum)
    update(running_var, var.flatten(1).mean(0) * (count / (count - 1)), momentum)
    return out


def normalized(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``[B, C, *S]`` normalised over ``dims``, and m, v and 1/√(v + ε)."""
    x = widened(input)
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    var = centred.square().mean(dims, keepdim=True)
    rstd = (var + eps).rsqrt()
    space = [-1] + [1] * (input.ndim - 2)
    w, b = (None if p is None else p.reshape(space) for p in (weight, bias))
    return affine(centred * rstd, w, b).to(input.dtype), mean, var, rstd


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return w x + b."""
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@torch.no_grad()
def update(running: Tensor | None, found: Tensor, momentum: float) -> None:
    """Update a running statistic as torch does, in place; graphs that saved it stay valid."""
    if running is not None:
        running.data.copy_((1 - momentum) * running + momentum * found.detach())


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the output dtype of a layer norm: x's, or float32 or better under GPU autocast."""
    device = x.device.type
    return wide(x) if device != "cpu" and torch.is_autocast_enabled(device) else x.dtype


def suits(p: Tensor | None, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether torch accepts the parameter p (or None) for x. If not, torch raises its own error."""
    return p is None or (tuple(p.shape) == shape and p.dtype in (x.dtype, wide(x)))


WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    torch.native_layer_norm: native_layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: functional_batch_norm,
    torch.batch_norm: batch_norm,
    torch.native_batch_norm: native_batch_norm,
    F.instance_norm: functional_instance_norm,
    torch.instance_norm: instance_norm,
}
