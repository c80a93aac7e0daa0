"""What an autograd graph holds: its leaves, its operations, and why it cannot be differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from gpkit.autodiff import compat

# Operations whose second derivative is zero: through them alone, an order >= 2 penalty is nothing.
PIECEWISE_LINEAR = ("Relu", "LeakyRelu", "Hardtanh", "Threshold", "PreluKernel", "Abs")


# What torch says (or calls a node) when there is no further derivative, and what helps.
HINTS = {
    "scaled_dot_product": "fused attention has no double backward: run the forward under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or give the penalty a callable, "
    "for which gpkit does so by itself",
    "cudnn_rnn": "cuDNN's recurrent nets have no double backward: run the forward under "
    "torch.backends.cudnn.flags(enabled=False), or give the penalty a callable",
    "use_reentrant=True": "reentrant checkpointing has no torch.autograd.grad: "
    "use checkpoint(..., use_reentrant=False)",
    "once_differentiable": "a custom autograd Function is marked @once_differentiable: "
    "write its backward in differentiable operations",
    "torch.compile with aot_autograd": "a compiled net has no double backward: "
    "compile the whole penalised loss instead, or leave the net uncompiled",
    "leaky_relu": "a piecewise-linear activation has no derivative of this order: "
    "use a smooth one (GELU, SiLU, softplus, tanh)",
    "NativeLayerNorm": "torch's third derivative of layer norm, and of batch norm in training "
    "mode, is wrong: give the penalty a callable, for which gpkit computes them in elementary "
    "operations, or run the forward under gpkit.elementary(), or use group norm or "
    "order=1",
    "donated buffers": "a compiled net gives its buffers up after one backward: set "
    "torch._functorch.config.donated_buffer = False before it is compiled",
    "freed": "the graph of the loss is gone: call the penalty before loss.backward()",
    "Inference tensors": "a tensor made under inference_mode is in the graph: clone it outside",
    "torch.utils.checkpoint": "checkpointing ran a forward again otherwise than before: if it has "
    "attention, run the whole training under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); if a "
    "penalty moves what it computes with, use estimator='exact' at the data",
    "modified by an inplace operation": "a tensor of the graph was changed in place",
}


def nodes(tensor: Tensor) -> Iterator[Any]:
    """Yield every node of the graph of ``tensor``, once."""
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def leaves(tensor: Tensor) -> list[Tensor]:
    """Return the leaf tensors that require grad and on which ``tensor`` depends."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    found = map(compat.leaf_of, nodes(tensor))
    return [leaf for leaf in found if leaf is not None]


def depends(y: Tensor, x: Tensor) -> bool:
    """Whether ``x`` is in the graph of ``y``."""
    if x.grad_fn is not None:
        return any(node is x.grad_fn for node in nodes(y))
    return any(leaf is x for leaf in leaves(y))


def between(y: Tensor, xs: tuple[Tensor, ...]) -> list[Any]:
    """Return the nodes on the paths from ``y`` to ``xs``: those that a derivative passes."""
    users: dict[Any, list[Any]] = {}
    stack = [x.grad_fn for x in xs if x.grad_fn is not None]
    for node in nodes(y):
        leaf = compat.leaf_of(node)
        if any(x is leaf for x in xs):
            stack.append(node)
        for parent, _ in node.next_functions:
            users.setdefault(parent, []).append(node)
    found: dict[Any, None] = {}
    while stack:
        for user in users.get(stack.pop(), []):
            if user not in found:
                found[user] = None
                stack.append(user)
    return list(found)


def require_derivatives(y: Tensor, xs: tuple[Tensor, ...], order: int) -> None:
    """Refuse a graph through which torch has no derivative of that order, or a wrong one.

    A backward marked @once_differentiable is taken for a constant where its argument is one, and
    torch's layer norm and batch statistics have a wrong third derivative (pytorch#175754): neither
    is an error there.

    Raises:
        RuntimeError: if an operation between ``xs`` and ``y`` is known to have none.
    """
    for node in between(y, xs) if order >= 2 else ():
        name, cause = node.name(), None
        if compat.is_once_differentiable(node):
            cause = HINTS["once_differentiable"]
        elif compat.is_fused_attention(name):
            cause = HINTS["scaled_dot_product"]
        elif order >= (2 if compat.is_second_derivative(name) else 3) and (
            compat.is_layer_norm(name) or compat.uses_batch_statistics(node, name)
        ):
            cause = HINTS["NativeLayerNorm"]
        if cause:
            raise RuntimeError(f"there is no derivative of order {order} through {name}: {cause}")


def piecewise_linear(y: Tensor) -> str | None:
    """Return the name of a piecewise-linear operation in the graph of ``y``, if there is one."""
    names = set(map(compat.operation_of, nodes(y)))
    return next((name for name in PIECEWISE_LINEAR if name in names), None)


def explain(error: RuntimeError) -> str:
    """Return torch's message in one line, with what to do about it where that is known."""
    said = str(error).strip().splitlines()[0]
    hint = next((hint for words, hint in HINTS.items() if words in str(error)), None)
    return f"{hint} (torch: {said})" if hint else said
