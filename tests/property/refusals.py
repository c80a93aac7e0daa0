"""What gpkit refuses, why there is no right answer, and what its advice changes.

`advised` does what a message says. Following the advice again and again must end in a comparison
that holds, or at a refusal without a way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.property.config import Config, comparable

UNTRAINED = "the penalty does not depend on any trained parameter"


@dataclass(frozen=True)
class Refusal:
    """A part of a message, without numbers; why it is right; and what the advice changes."""

    text: str
    why: str
    advice: dict[str, Any] | Callable[[Config], dict[str, Any]] | None = None


def alone(c: Config) -> dict[str, Any]:
    """Choose one number of the output."""
    return {"outputs": 1} if c.net == "dict" else {"of": "total"}


def called(c: Config) -> dict[str, Any]:
    """Give the penalty a function."""
    return {"call": "closure" if c.in_weights else "module"}


REFUSALS = (
    Refusal(
        "the outputs of a batch depend on each other",
        "batch norm: the gradient of the batch's sum is zero",
        lambda c: {"forward": "eval", **called(c)},
    ),
    Refusal(UNTRAINED, "the gradient is zero: `require_untrained` compares it"),
    Refusal("selects by name: pass the module, not tensors", "tensors have no names", called),
    Refusal("is captured in a forward pass that the penalty runs", "it may be any", called),
    Refusal("needs the module that contains it", "activations have names", called),
    Refusal(
        "`scope=...` must be one of",
        "inputs have samples and pixels, weights have batches",
        {"scope": "sample", "mean": False},
    ),
    Refusal(
        "takes order=# with estimator='exact' or 'finite_difference'",
        "a mean over micro-batches is implemented for gradients",
        {"order": 1, "estimator": "exact"},
    ),
    Refusal(
        "averages gradients of the training forward passes",
        "other forward passes have other gradients",
        {"scope": "batch"},
    ),
    Refusal(
        'scope="accumulated" needs the micro-batches',
        "only the callback knows them",
        {"scope": "batch"},
    ),
    Refusal(
        "needs one number, or losses []",
        "means of Jacobians over ranks are not implemented",
        alone,
    ),
    Refusal('`scope="pixel"` needs images', "vectors have no pixels", {"scope": "sample"}),
    Refusal('`scope="pixel"` takes order=#', "it mixes pixels", {"scope": "sample"}),
    Refusal(
        "`scope=\"pixel\"` takes estimator='exact' or 'projection'",
        "the others have one direction for a sample",
        {"estimator": "exact"},
    ),
    Refusal(
        'scope="sample" needs one loss per sample', "a mean has lost them", {"mean": False}
    ),
    Refusal("as a function of the variable takes order=#", "it is of x", {"metric": "mask"}),
    Refusal("takes order=#; got order=#", "it differentiates once", {"estimator": "exact"}),
    Refusal("`estimator=taylor()` is for inputs", "", {"estimator": "projection"}),
    Refusal(
        "` needs wrt='input'; got weights",
        "a step has no sample in the weights",
        lambda c: {"wrt": "input", "scope": None, "call": "module"}
        if c.estimator == "curvature_difference"
        else {"estimator": "finite_difference"},
    ),
    Refusal(
        "norm of a first derivative; got order",
        "J and Jᵀy are of a first derivative",
        {"estimator": "exact"},
    ),
    Refusal("estimates the l# norm; got norm=", "it estimates squares", {"estimator": "exact"}),
    Refusal("takes one output per group; got #", "one slope", {"estimator": "exact"}),
    Refusal("needs a forward-mode derivative", "torch has none", {"estimator": "exact"}),
    Refusal("needs a callable, to", "a tensor cannot be evaluated elsewhere", called),
    Refusal("Taylor mode has no rule", "", {"estimator": "exact"}),
    Refusal("needs smooth operations", "series ignore kinks", {"net": "softplus"}),
    Refusal(
        "is about a forward pass that the penalty runs itself; got a tensor",
        "it has run already",
        {"forward": "isolated"},
    ),
    Refusal(
        "draws labels from logits [] with C >= #",
        "one output has one class",
        {"outputs": 3, "flat": False, "net": "tanh"},
    ),
    Refusal(
        "has a slope target, which needs one output per sample",
        "a slope is of one number",
        alone,
    ),
    Refusal(
        "torch's third derivative of layer norm, and of batch norm in training mode, is wrong",
        "",
        lambda c: {"order": 1} if c.call == "with_loss" else called(c),
    ),
    Refusal(
        "a gradient needs floating-point samples",
        "tokens have no gradient",
        {"wrt": "activation", "scope": None, "metric": "", "target": False, "at": "data"},
    ),
    Refusal("does not broadcast to a sample", "the box is of another shape", {"at": "uniform"}),
    Refusal("must have the shape of the derivative", "", {"target": False, "metric": ""}),
    Refusal("takes no target= and no metric=", "no entries", {"estimator": "exact"}),
    Refusal("takes target= and metric= at order=#", "no entries", {"estimator": "exact"}),
    Refusal("takes order=# for several variables", "blocks", {"target": False, "metric": ""}),
    Refusal("takes real variables; got", "", {"target": False, "metric": ""}),
    Refusal("so it takes no sample_weight=", "one norm of all ranks", {"weigh": False}),
    Refusal("sample_weight= takes reduce=", "a maximum has no weights", {"reduce": "mean"}),
    Refusal("does not weigh the running average", "", {"centered": "number"}),
    Refusal("sample_weight= of a weight penalty needs losses", "", {"mean": False}),
    Refusal("metric= must be the same for all", "sums of rows", {"estimator": "exact"}),
    Refusal(
        "is for a penalty of the loss that the closure returns",
        "the closure has one result",
        {"call": "closure"},
    ),
    Refusal("the closure must return a loss, or losses []", "", {"call": "closure"}),
    Refusal("could not create a primitive descriptor", "no bfloat16 convolution on this CPU"),
)  # fmt: skip


def refusal(message: str) -> Refusal | None:
    """Return the entry for a message."""
    return next((r for r in REFUSALS if r.text in kind_of(message)), None)


def advised(c: Config, message: str) -> Config | None:
    """Return the configuration that the message advises; None if it has no advice."""
    found = refusal(message)
    if found is None or found.advice is None:
        return None
    return comparable(replace(c, **(found.advice(c) if callable(found.advice) else found.advice)))


def kind_of(message: str) -> str:
    """Return a message without its numbers and lists, to count refusals of a kind."""
    message = re.sub(r"\[[^\]]*\]", "[]", message)
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", message)
