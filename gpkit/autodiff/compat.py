"""All private API of torch that gpkit uses.

Each entry says what it is for, and why the public API does not do. If a release of torch removes
one, `tests/autodiff/test_torch_compat.py` fails with its name.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Trees of tensors, such as batches. torch has no public module for them, and optree would be one
# more dependency. torch itself uses this module everywhere.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

# Kernels.

Switch = tuple[Callable[[], bool], Callable[[bool], None]]


def attention_switch(kind: str) -> Switch:
    """Return two functions that read and set whether a kind of attention kernel is enabled.

    They run at every step, and the public `sdpa_kernel` takes eight times as long. The public
    functions in torch.backends.cuda are a quarter slower; they are the fallback if a release
    renames the private ones.

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


# Nodes of an autograd graph, by name: torch.autograd.graph.Node has `name()`, but no public
# attribute for the kind of operation.

# The wrapper that @once_differentiable returns: its code is the same for every backward.
_ONCE: Any = once_differentiable(lambda ctx, *grads: None)

_TRACKER = ModuleTracker()

# nodes_made(): the number of nodes that this thread has made. torch has no public counter.
nodes_made: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


def hooks_made() -> int:
    """Return how many hooks were registered; a node does not tell which it has."""
    return RemovableHandle.next_id


# made_at(node): how many nodes its thread had made before. Leaves' nodes have the largest number.
made_at: Callable[[Any], int] = methodcaller("_sequence_nr")

# The attribute of a node that holds the leaf tensor whose gradient it accumulates. The public
# `torch.autograd.graph.get_gradient_edge(leaf)` only goes the other way, from a leaf to its node.
LEAF = "variable"


def operation_of(node: Any) -> str:
    """Return the operation that a node differentiates, such as "Tanh", for any derivative of it."""
    return node.name().partition("Backward")[0]


CASTS = "ToCopyBackward0"  # the class of a node that changes a dtype, or a device


def dtypes_of(node: Any) -> set[torch.dtype]:
    """Return the dtypes of what a node of an autograd graph has computed.

    The public `Node.metadata` has none; without them a net that runs a part of itself in half
    precision, and returns float32, is taken for one in float32.
    """
    return {out.dtype for out in node._input_metadata}


def saved(node: Any, name: str) -> Any:
    """Return what a node has saved for its backward pass, or None if it has no such value.

    The documentation shows these attributes for looking at a graph, and does not promise names.

    Args:
        node: a node of an autograd graph, whose backward pass has not freed it.
        name: such as "indices", as in torch's derivatives.yaml.

    Returns:
        A tensor or a number.
    """
    return getattr(node, f"_saved_{name}", None)


def packs_saved(node: Any) -> bool:
    """Whether hooks pack what a node has saved, as in a checkpoint, which lets it be read once.

    The private `SavedTensor` is the only one to tell. Where a release does not show its hook, the
    answer is yes: then values are not read, and less is known of the node.

    Args:
        node: a node of an autograd graph.

    Returns:
        Whether reading a saved value would run a hook.
    """
    names = ("result", "self", "condition", "mask", "indices", "index", "result1", "mat1", "input")
    found = (getattr(node, f"_raw_saved_{name}", None) for name in names)
    return any(getattr(raw, "unpack_hook", True) is not None for raw in found if raw is not None)


def is_second_derivative(name: str) -> bool:
    """Whether a node with this name is the derivative of a fused backward."""
    return "BackwardBackward" in name


def is_fused_attention(name: str) -> bool:
    """Whether a node with this name is fused attention, which has no double backward."""
    return name.startswith("ScaledDotProduct")


def is_layer_norm(name: str) -> bool:
    """Whether a node with this name is fused layer norm, or its derivative."""
    return name.startswith("NativeLayerNorm")


def class_of(node: Any) -> str:
    """Return the class of a node, such as "MishBackward0". It is faster to read than a name."""
    return type(node).__name__


# saved_input(node): the input of an elementwise operation, with its graph. torch documents these
# attributes in its tutorial on saved tensors, though the names have an underscore.
saved_input: Callable[[Any], Tensor] = attrgetter("_saved_self")


# Attributes of batch norm nodes that hold the mode; and nodes that exist in training mode only.
_TRAINING_FLAGS = ("_saved_training", "_saved_train", "_saved_update")
_IN_TRAINING_ALONE = (
    "CudnnBatchNormBackwardBackward",
    "MiopenBatchNormBackwardBackward",
    "BatchNormWithUpdateBackward",
)


def uses_batch_statistics(node: Any, name: str) -> bool:
    """Whether a node is batch norm in training mode, or its derivative.

    The mode is only available among the values that the node saved for the backward pass.

    Args:
        node: a node of an autograd graph.
        name: its name.

    Returns:
        False in eval mode, and for any other operation.
    """
    if "BatchNorm" not in name:
        return False
    if name.startswith(_IN_TRAINING_ALONE):
        return True
    return any(getattr(node, flag, False) for flag in _TRAINING_FLAGS)


def couples_samples(node: Any) -> bool:
    """Whether a node is batch norm in training mode, over several samples.

    Only the private metadata of a node tells the shape of its output.

    Args:
        node: a node of an autograd graph.

    Returns:
        False for instance norm too, which is batch norm of one sample with B·C channels.
    """
    return uses_batch_statistics(node, class_of(node)) and node._input_metadata[0].shape[0] > 1


def is_once_differentiable(node: Any) -> bool:
    """Whether a node is a custom Function whose backward is marked @once_differentiable.

    torch has no flag for it. Trying a double backward does not detect it either: if the incoming
    gradient is a constant, torch treats the backward as a constant, without an error.

    Args:
        node: a node of an autograd graph.

    Returns:
        Whether its backward has the code of the decorator's wrapper, or says that it calls it.
    """
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _ONCE.__code__ or hasattr(backward, "once")


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a node is `checkpoint(..., use_reentrant=True)`, whose class is private."""
    return node.name() == "CheckpointFunctionBackward"


def is_static_ddp(node: Any) -> bool:
    """Whether a node is the output of a DistributedDataParallel module with a static graph.

    On its first step such a module starts the reduction of gradients when a backward pass reaches
    this node, also that of `torch.autograd.grad`. The node's class is private, and what the module
    returns has no other sign of it.

    Args:
        node: a node of an autograd graph.

    Returns:
        False for any other node; and after the first step, when such a module is safe.
    """
    owner = getattr(node, "ddp_weakref", None)
    return owner is not None and bool(getattr(owner(), "static_graph", False))


class recomputing_by:
    """A context in which what is checkpointed is run again by ``wrap(function)``.

    The public ``context_fn`` is an argument of each call of `checkpoint`, in the user's own net.
    """

    def __init__(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.wrap = wrap

        self.module: Any = torch.utils.checkpoint

    def __enter__(self) -> None:
        self.frame = self.module._CheckpointFrame  # it holds the function that runs the part again
        self.module._CheckpointFrame = self.wrapped

    def __exit__(self, *exception: object) -> None:
        self.module._CheckpointFrame = self.frame

    def wrapped(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the frame of a part that is run again by another function."""
        return self.frame(self.wrap(function), *args, **kwargs)


def in_backward() -> bool:
    """Whether this thread runs a backward pass: a forward pass in it is then a checkpoint rerun."""
    return bool(_TRACKER.is_bw)  # public, but not documented to be exact


# Modules and tensors.

# buffers_of(module): the dictionary of a module's own buffers, to replace them in.
# `named_buffers` takes thirty times as long, and a module may override `setattr`.
buffers_of: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")

# The same for a module's own children, parameters and forward hooks.
children_of: Callable[[nn.Module], dict[str, nn.Module | None]] = attrgetter("_modules")
parameters_of: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_parameters")
hooks_of: Callable[[nn.Module], Any] = attrgetter("_forward_hooks", "_forward_pre_hooks")


# hooks_on(tensor): the hooks of `Tensor.register_hook` in a dictionary, or None.
# Torch has no public way to ask for them.
hooks_on: Callable[[Tensor], Any] = attrgetter("_backward_hooks")

# base_of(tensor): what a view is a view of, or None. There is no public way to ask.
base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")


def keeps_graph() -> bool:
    """Whether the backward pass that runs now retains the graph, for another one.

    A custom Function is not told. Where a release does not tell either, the answer is yes: then
    gradients that could be given away are copied.

    Returns:
        True outside of a backward pass too.
    """
    told = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if told is None else bool(told())


# write_count(tensor): the number of in-place writes to a tensor, not counted in inference mode.
# torch.autograd.graph has `increment_version`, but no function to read the version.
write_count: Callable[[Tensor], int] = attrgetter("_version")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, by ``torch.compile(module)`` or ``module.compile()``.

    Its children are not inspected. `torch.compiler` only tells what is being compiled now.

    Returns:
        True for the result of ``torch.compile(module)``, and after ``module.compile()``.
    """
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def is_compiled_function(function: Any) -> bool:
    """Whether a function was returned by torch.compile."""
    # inspect.unwrap goes through any decorator, and does not say which.
    return hasattr(function, "_torchdynamo_orig_callable")


def uncompiled_name(name: str) -> str:
    """Return the name of a submodule without the wrappers of torch.compile."""
    # What torch.compile(module) returns holds the module under a name of its own.
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def unscales_in_its_step(optimizer: Any) -> bool:
    """Whether an optimiser unscales gradients itself, as fused ones do. It has no public flag."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# Operations on lists of tensors, by which torch's optimisers take one call instead of one a tensor.
_NAMES = [
    f"_foreach_{name}" for name in ("norm", "mul", "add", "lerp", "add_", "sub_", "mul_", "lerp_")
]
norms_of, times, plus, lerp, add_to, subtract_from, scale_by, lerp_to = attrgetter(*_NAMES)(torch)
