"""Private API of torch that tells where a node of an autograd graph comes from.

`tests/autodiff/test_locating.py` fails with the name of what a release takes away.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

# made_at(node): the number of the node in the order in which its thread made nodes, which tells
# the module whose forward made it. The profiler shows it; there is no public function.
made_at: Callable[[Any], int] = methodcaller("_sequence_nr")


def ones_for(node: Any) -> list[Tensor]:
    """Return what a backward pass gives to a node, one tensor for each output, with ones in it.

    The public `Node.metadata` has no shapes.

    Args:
        node: a node of an autograd graph.

    Returns:
        Tensors that require grad.
    """
    return [
        torch.ones(tuple(out.shape), dtype=out.dtype, device=out.device).requires_grad_()
        for out in node._input_metadata
    ]


def is_compiled_node(node: Any) -> bool:
    """Whether a node is a graph that torch.compile has made, by the name of its class."""
    return node.name().startswith("CompiledFunction")


# The backends of torch.compile that run the operations that they were given.
EAGER = ("eager", "eager_noexcept", "eager_debug", "pre_dispatch_eager")


def runs_eagerly(module: Any) -> bool:
    """Whether a compiled module runs torch's own operations, by the name of its backend.

    The public ``get_compiler_config()`` tells inductor from all others, and not more.

    Returns:
        False if the backend is another one, or not known.
    """
    compiled = module._compiled_call_impl or module.forward
    found = [cell.cell_contents for cell in compiled.__closure__ or ()]
    found += [getattr(module, "dynamo_ctx", None), getattr(compiled, "__self__", None)]
    for start in found:
        function = getattr(start, "callback", start)
        while hasattr(function, "_torchdynamo_orig_backend"):
            function = function._torchdynamo_orig_backend
        if getattr(function, "compiler_name", None) in EAGER:
            return True
    return False


def has_values(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at: not within `torch.func.vmap` or grad."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def compiled_from(module: Any) -> Any:
    """Return what ``torch.compile(module)`` was given; any other module as it is."""
    return getattr(module, "_orig_mod", module)
