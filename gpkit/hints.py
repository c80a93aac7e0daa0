"""What torch's error messages mean, and what to do: the words of errors and of findings."""

from __future__ import annotations

from gpkit.finding import Finding, FoundError, error

FREED = (
    "memory-freed",
    "FSDP2 has freed weights that this derivative needs: run the forward pass, the penalty and the "
    "backward pass within gpkit.unsharded(net)",
)
NORM_LAYER = (
    "wrong-derivative",
    "torch's third derivative of layer norm, and of batch norm in training mode, is wrong: give "
    "the penalty a callable (gpkit then computes them in elementary operations), run the forward "
    "under gpkit.elementary(), use group norm, or use order=1",
)
NONE = "no-double-backward"

# Words of torch's error messages, or names of nodes, and for each the code and words of a finding.
HINTS = {
    "scaled_dot_product": (
        NONE,
        "fused attention has no double backward: run the forward under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or give the penalty a callable: gpkit "
        "then does this itself",
    ),
    "cudnn_rnn": (
        NONE,
        "cuDNN's recurrent nets have no double backward: run the forward under "
        "torch.backends.cudnn.flags(enabled=False), or give the penalty a callable",
    ),
    "use_reentrant=True": (
        "reentrant-checkpoint",
        "a module uses reentrant checkpointing, which has no double backward: "
        "use checkpoint(..., use_reentrant=False)",
    ),
    "once_differentiable": (
        "once-differentiable",
        "a custom autograd Function is marked @once_differentiable: "
        "write its backward in differentiable operations",
    ),
    "torch.compile with aot_autograd": (
        "compiled",
        "a compiled net has no double backward: leave the net uncompiled; in a loss of your own "
        "that is compiled call torch.compiler.disable(penalty); or compile loss and penalty "
        "together, gpkit.compile(loss)",
    ),
    "leaky_relu": (
        "piecewise-linear",
        "a piecewise-linear activation has no derivative of this order: "
        "use a smooth one (GELU, SiLU, softplus, tanh)",
    ),
    "NativeLayerNorm": NORM_LAYER,
    "_cdist": (
        NONE,
        "torch.cdist has no second derivative: use "
        'compute_mode="use_mm_for_euclid_dist", or estimator="finite_difference"',
    ),
    "_pdist": (
        NONE,
        "torch.pdist has no second derivative: compute the distances by torch.cdist with "
        'compute_mode="use_mm_for_euclid_dist"',
    ),
    "ctc_loss": (NONE, 'ctc_loss has no second derivative: use estimator="finite_difference"'),
    "embedding_bag": (
        NONE,
        "embedding_bag has no second derivative: use nn.Embedding and a mean, or "
        'estimator="finite_difference"',
    ),
    "hardsigmoid": (
        NONE,
        "hardsigmoid has no second derivative: use sigmoid, gpkit.prepare(net), or "
        'estimator="finite_difference"',
    ),
    "is not implemented": (
        NONE,
        "torch has no second derivative of this operation: use "
        'estimator="finite_difference", or another operation',
    ),
    "donated buffers": (
        "compiled",
        "a compiled net frees its buffers after one backward: set "
        "torch._functorch.config.donated_buffer = False before it is compiled",
    ),
    "storage of size 0": FREED,
    "data is not allocated yet": FREED,
    "freed": (
        "memory-freed",
        "the graph of the loss has been freed: call the penalty before loss.backward()",
    ),
    "Inference tensors": (
        "memory-freed",
        "the graph has a tensor made under inference_mode: clone it outside",
    ),
    "torch.utils.checkpoint": (
        "random-forward",
        "checkpointing recomputed a different forward pass: if it has attention, run the whole "
        "training under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); if a penalty moves its "
        "inputs or weights, use estimator='exact' at the data",
    ),
    "used in an in-place operation": (
        "in-place",
        "the net writes in place to a leaf that is differentiated: use inplace=False, "
        "gpkit.prepare(net), or write to a copy",
    ),
    "modified by an inplace operation": (
        "in-place",
        "a tensor that the graph needs was modified in place",
    ),
}


def hint_for(words: str) -> Finding | None:
    """Return the finding that an error message, or the name of a node, tells; None if none does.

    >>> hint_for("derivative for aten::hardsigmoid_backward is not implemented").why
    'hardsigmoid has no second derivative'
    """
    found = next((hint for key, hint in HINTS.items() if key in words), None)
    return found and error(*found)


class ExplainedError(FoundError):
    """torch's error in one line, with a hint if one is known.

    Args:
        raised: torch's error.
    """

    def __init__(self, raised: RuntimeError) -> None:
        said, hint = str(raised).strip().splitlines()[0], hint_for(str(raised))
        found = hint or Finding("call", "error", said)
        super().__init__(found, f"{hint} (torch: {said})" if hint else said)
