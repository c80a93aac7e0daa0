"""The axis `of`: what is differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpkit.autodiff.numerics import wide
from gpkit.autodiff.random import Source, uniform
from gpkit.axes.average import running_average
from gpkit.axes.form import Form

Of = str | Callable[[Any], Tensor]


def sampled_losses(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the cross-entropy of each sample, with a label drawn from its own softmax.

    .. math:: \ell_i = -\log p_i(\hat y_i), \quad \hat y_i \sim p_i = \mathrm{softmax}(z_i)

    Args:
        logits: z, ``[B, C]``.
        labels: ŷ, ``[B]``, see `draw_labels`.

    Returns:
        ℓ ``[B]``, in float32 or better.
    """
    return F.cross_entropy(logits.to(wide(logits)), labels, reduction="none")


def draw_labels(logits: Tensor, rng: Source) -> Tensor:
    """Return labels ``[B]`` drawn from the softmax of each row of ``[B, C]``, without a graph.

    Raises:
        ValueError: if the logits are not ``[B, C]`` with C >= 2.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f'of="sampled_loss" draws labels from logits [B, C] with C >= 2; got '
            f"{list(logits.shape)}: give the penalty the logits, not the loss"
        )
    cumulative = logits.detach().double().softmax(1).cumsum(1)  # [B, C]
    u = uniform(rng, [len(logits)], logits.device, torch.float32).double()
    return (cumulative[:, :-1] <= u.unsqueeze(1)).sum(1)


@dataclass(frozen=True)
class per_pixel:
    """The output divided by the square root of its number of pixels: f / √(H·W).

    For an output ``[B, C, H, W]``. All dimensions after the first two are pixels; ``[B]`` and
    ``[B, C]`` have one pixel.

    >>> per_pixel()(torch.ones(1, 3, 2, 2))[0, 0, 0]
    tensor([0.5000, 0.5000])
    """

    def __call__(self, output: Tensor) -> Tensor:
        """Return the scaled output, of the same shape."""
        return output / math.sqrt(math.prod(output.shape[2:]))


def class_sum(output: Tensor) -> Tensor:
    """Return the sum of the outputs of each sample: ``[B, C]`` to ``[B]``."""
    return output.flatten(1).sum(1) if output.ndim > 1 else output


def log_probabilities(logits: Tensor) -> Tensor:
    """Return Σ_k log p_k of the softmax p of each sample's logits: ``[B, C]`` to ``[B]``."""
    return logits.to(wide(logits)).log_softmax(1).sum(1)


def require_one_output(form: Form, y: Tensor) -> None:
    """Refuse a form with a slope target for several outputs ``[G, m]`` that nobody chose.

    Raises:
        ValueError: if the form pulls the norm, here that of a Jacobian, to a target above zero.
    """
    # A compiled graph cannot branch on values; the first step, which is not compiled, has looked.
    if not torch.compiler.is_compiling() and has_target(form, y.detach()):
        raise ValueError(
            f"`form={type(form).__name__}` has a slope target, which needs one output per sample; "
            f"got {y.shape[1]}, and a target for the Frobenius norm of a Jacobian has no meaning: "
            "choose with of=lambda o: o[:, 0] for one of the outputs, or "
            "of=lambda s: s.flatten(1).sum(1) for scores of patches; flatten points [B, N, 3] to "
            "[B*N, 3]"
        )


def has_target(form: Form, y: Tensor) -> bool:
    """Whether a form pulls norms to a target above zero, for outputs ``y`` ``[G, m]``."""
    # It does if some slope costs no more than none: (n - 1)² does, n² and √(n² + ε) do not.
    center = getattr(form, "center", None)
    if center is not None:
        return isinstance(center, running_average) or bool(torch.as_tensor(center).any())
    n2 = y.new_ones(max(len(y), 1), dtype=wide(y))
    with torch.no_grad():
        zero, *costs = [form.value(n2 * n**2).sum() for n in (0.0, 0.1, 1.0, 10.0)]
    return not all(cost > zero for cost in costs)


LINEAR = ("AddmmBackward", "MmBackward", "ConvolutionBackward", "LinearBackward")


def require_losses(y: Tensor) -> None:
    """Refuse outputs ``[B, C]`` of a linear layer where losses are expected: they are logits.

    Losses of steps ``[B, T]`` have the same shape, and come from another operation.

    Raises:
        ValueError: if they are.
    """
    node = y.grad_fn
    while node is not None and node.name().startswith(("View", "UnsafeView", "Squeeze")):
        node = node.next_functions[0][0]
    if node is not None and node.name().startswith(LINEAR):
        raise ValueError(
            f'of="loss" needs losses: one value per sample, [{len(y)}], or for each step, '
            f"[{len(y)}, T]; got {list(y.shape)}, the output of a linear layer: compute the loss, "
            'with reduction="none"; for outputs use of="output", as gpkit.jacobian does'
        )


def scores_of(y: Any) -> list[Any]:
    """Return the scores of an output: those of a list, as multi-scale critics return, or itself."""
    return list(y) if isinstance(y, list) and y and all(isinstance(s, Tensor) for s in y) else [y]


def named_parts(output: Any) -> str:
    """Return how to select a tensor from an output that is none, for an error message."""
    if isinstance(output, Mapping):
        found = {k: v for k, v in output.items() if isinstance(v, Tensor)}
        chosen = {str(k): f"lambda output: output[{k!r}]" for k in found}
    elif isinstance(output, (list, tuple)) and not hasattr(output, "_fields"):
        chosen = {"0": "lambda output: output[0]"}
        if output and all(isinstance(part, Tensor) for part in output):
            return "select one with `of=lambda output: output[0]`, or all of them with `of=list`"
    else:
        names = getattr(output, "_fields", None) or getattr(output, "__dict__", {})
        found = {n: getattr(output, n) for n in names}
        chosen = {
            n: f"lambda output: output.{n}" for n, v in found.items() if isinstance(v, Tensor)
        }
    likely = [n for word in LIKELY for n in chosen if word in n.lower()]
    name = next(iter(likely or chosen), None)
    if name is None:
        return "return the tensor to differentiate"
    listed = "" if isinstance(output, (list, tuple)) and name == "0" else ", ".join(chosen)
    return f"{f'it has {listed}; ' if listed else ''}select one with `of={chosen[name]}`"


LIKELY = ("logits", "score", "output", "prediction", "loss")  # the first of them is suggested
