"""All that gpkit uses of torch beside its public API, in one place.

Each entry says what it is for, and which public way was tried. `tests/autodiff/test_compat.py`
fails with the name of the entry when a release takes it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Trees of tensors, as batches are. torch has no public module for them, though much of it is built
# on this one; optree, which is public, would be one more dependency.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils.module_tracker import ModuleTracker

# Kernels.

Switch = tuple[Callable[[], bool], Callable[[bool], None]]


def attention_switch(kind: str) -> Switch:
    """Return two functions: whether a kind of attention kernel is enabled, and to enable it.

    They are called at every step, and `sdpa_kernel`, the public way, takes eight times as long.
    torch.backends.cuda has public functions around these, a quarter slower; they serve where a
    release has renamed these.

    Args:
        kind: "flash", "mem_efficient", "cudnn" or "math".

    Returns:
        ``enabled()`` and ``enable(on)``.
    """
    enabled = getattr(torch._C, f"_get_{kind}_sdp_enabled", None)
    enable = getattr(torch._C, f"_set_sdp_use_{kind}", None)
    if enabled is None or enable is None:
        public = torch.backends.cuda
        return getattr(public, f"{kind}_sdp_enabled"), getattr(public, f"enable_{kind}_sdp")
    return enabled, enable


# Nodes of an autograd graph, by their names: torch.autograd.graph.Node has `name()`, and nothing
# that tells the kind of an operation.

# What @once_differentiable makes of any backward: all have the same code.
_ONCE: Any = once_differentiable(lambda ctx, *grads: None)

_TRACKER = ModuleTracker()


def leaf_of(node: Any) -> Tensor | None:
    """Return the leaf tensor whose gradient a node accumulates; None for any other node.

    The way back, `torch.autograd.graph.get_gradient_edge(leaf)`, asks for leaves to start from.
    """
    return getattr(node, "variable", None)


def operation_of(node: Any) -> str:
    """Return the operation that a node differentiates, once or more often: "Tanh" or "Relu"."""
    return node.name().partition("Backward")[0]


def is_second_derivative(name: str) -> bool:
    """Whether a node of this name differentiates a derivative that torch has in one kernel."""
    return "BackwardBackward" in name


def is_fused_attention(name: str) -> bool:
    """Whether a node of this name is of attention in one kernel, which has no double backward."""
    return name.startswith("ScaledDotProduct")


def is_layer_norm(name: str) -> bool:
    """Whether a node of this name is of layer norm in one kernel, or of its derivative."""
    return name.startswith("NativeLayerNorm")


# What the nodes of batch norm call the mode; and those that have none, being of training alone.
_TRAINING_FLAGS = ("_saved_training", "_saved_train", "_saved_update")
_IN_TRAINING_ALONE = (
    "CudnnBatchNormBackwardBackward",
    "MiopenBatchNormBackwardBackward",
    "BatchNormWithUpdateBackward",
)


def uses_batch_statistics(node: Any, name: str) -> bool:
    """Whether a node is of batch norm in training mode, or of its derivative.

    The mode is only among what the node has saved for the backward pass.

    Args:
        node: of a graph.
        name: its name.

    Returns:
        False in evaluation mode, and for any other operation.
    """
    if "BatchNorm" not in name:
        return False
    if name.startswith(_IN_TRAINING_ALONE):
        return True
    return any(getattr(node, flag, False) for flag in _TRAINING_FLAGS)


def is_once_differentiable(node: Any) -> bool:
    """Whether a node is of a Function whose backward is marked @once_differentiable.

    torch leaves no mark. To differentiate and see does not do: where its argument is a constant,
    such a backward is taken for one, and nothing is said.

    Args:
        node: of a graph.

    Returns:
        Whether its backward has the code that the decorator gives to all.
    """
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _ONCE.__code__


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a node is of `checkpoint(..., use_reentrant=True)`, whose class is not public."""
    return node.name() == "CheckpointFunctionBackward"


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread: a forward in it is one made again."""
    return bool(_TRACKER.is_bw)  # public; that it is exact is promised nowhere


# Modules and tensors.


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary of a module's own buffers, in which they can be replaced.

    `named_buffers` takes thirty times as long, and `setattr` may be a module's own, which does
    anything else.
    """
    return module._buffers


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile stands behind a module's call, whichever way it was compiled.

    `torch.compiler` tells what is being compiled, not what was, and the class of what
    ``torch.compile(module)`` returns is private, in a module that takes a second to import.

    Args:
        module: any; its children are not looked at.

    Returns:
        True after ``torch.compile(module)``, for what it gave, and after ``module.compile()``.
    """
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def is_compiled_function(function: Any) -> bool:
    """Whether a function is what torch.compile has made of another: it keeps the other so."""
    # inspect.unwrap goes through any decorator, and does not say which.
    return hasattr(function, "_torchdynamo_orig_callable")


def uncompiled_name(name: str) -> str:
    """Return the name of a submodule without those that torch.compile has put around others."""
    # What torch.compile(module) returns holds the module under a name of its own.
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def write_count(tensor: Tensor) -> int:
    """Return how often a tensor was written to, which is not counted in inference mode.

    torch.autograd.graph has `increment_version`, and nothing to read it with.
    """
    return tensor._version


def unscales_in_its_step(optimizer: Any) -> bool:
    """Whether an optimiser unscales gradients itself, as fused ones do: torch tells it so alone."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# Compiling.


def traces_gradients() -> bool:
    """Whether torch.compile can trace a gradient, as that of 2.13: it has an option for it.

    There is no public way to ask, or to turn it on.

    Returns:
        Whether the option is there.
    """
    import torch._dynamo

    return hasattr(torch._dynamo.config, "trace_autograd_ops")


def tracing_gradients() -> AbstractContextManager[Any]:
    """Return a context in which torch.compile traces gradients, and compiles up to 256 graphs.

    The limit counts the graphs of all modules in the process, as those of a sweep. It is public in
    torch.compiler.config, but to patch two configs at every step takes twice as long.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=256)


# Subclasses of Tensor: what "Extending PyTorch" says to use, though the names have an underscore.


def wrapper_tensor(cls: type, like: Tensor) -> Any:
    """Return a tensor of a subclass that has no storage, of the shape and strides of another."""
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), **options)


def no_torch_function() -> Any:
    """Return the ``__torch_function__`` of a subclass that answers elementary operations alone.

    torch knows this one and does not call it. One that runs the operation as it is takes longer; it
    serves where a release has renamed this.
    """
    return getattr(torch._C, "_disabled_torch_function_impl", classmethod(_as_it_is))


def _as_it_is(
    cls: type,
    func: Callable[..., Any],
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))
