"""Does a penalty train anything? Asked for each net that a penalty meets, at its first step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.autodiff.compat import base_of, packs_saved, saved, uses_batch_statistics
from gpkit.autodiff.derivatives import first_gradients
from gpkit.autodiff.reached import reached
from gpkit.axes.form import Form
from gpkit.estimators.base import Estimator, Target
from gpkit.finding import Finding, FoundError, FoundWarning, error
from gpkit.formula import Terms

UNTRAINED = "the penalty does not depend on any trained parameter: "


class SeenNets:
    """The nets that a penalty has been found to train, told apart by their graphs.

    A net is known by the kinds of operations in its graph, and by its parameters. So another net,
    other layers, and a parameter that was frozen or released since count as new.
    """

    def __init__(self) -> None:
        self.found: dict[Any, dict[int, weakref.ref[Tensor]]] = {}

    def __bool__(self) -> bool:
        return bool(self.found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeenNets) and self.found.keys() == other.found.keys()

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, target: Target) -> bool:
        key, leaves, _ = target.fingerprint
        found = self.found.get(key)
        return found is not None and all(found[id(leaf)]() is leaf for leaf in leaves)

    def add(self, target: Target) -> None:
        """Remember the net of a target."""
        if len(self.found) >= MANY:  # such as parameters that are made anew at every step
            self.found.clear()
        key, leaves, _ = target.fingerprint
        self.found[key] = {id(leaf): weakref.ref(leaf) for leaf in leaves}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as empty: the nets of a copy are other nets."""
        return SeenNets, ()


class Unchecked(SeenNets):
    """Takes every net for one that has been looked at: no check, and no cost of one."""

    def __bool__(self) -> bool:
        return True

    def __contains__(self, target: Target) -> bool:
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as it is."""
        return Unchecked, ()


MANY = 64


def trains(
    f: Any, terms: Terms, targets: Sequence[Target], order: int, unused: str, *, twice: bool
) -> bool:
    """Return whether a penalty depends on a trained parameter.

    Args:
        f: what the penalty was called with.
        terms: the terms of an evaluation, with their graph.
        targets: the differentiated outputs.
        order: k, the order of the derivative.
        unused: the variables and a hint, for the error if no output depends on them.
        twice: whether the penalty's backward pass goes through derivatives.

    Returns:
        True if it does; False if the outputs do not depend on any trained parameter either: then
        the caller only wants the value.

    Raises:
        UntrainedError: if the outputs depend on trained parameters and the penalty does not, if all
            parameters are frozen, or if the penalty has no gradient or one that is not finite.
    """
    given = [x for t in targets for x in t.xs if t.batched]

    def trained(tensor: Tensor) -> list[Tensor]:
        return [p for p in graph.leaves(tensor) if not any(p is x for x in given)]

    kink = None
    if not terms.norms.any():
        kink = next(filter(None, (graph.has_no_curvature(t.y, order) for t in targets)), None)
    if trained(terms.reduced) and not kink:
        for target in targets:
            require_independent_samples(target, terms)
        if twice:
            require_gradient(terms.reduced, trained(terms.reduced))
        return True
    if not any(trained(t.y) for t in targets):
        if is_frozen(f, targets):
            raise UntrainedError(
                "frozen",
                "all parameters of the net are frozen: call net.requires_grad_(True), "
                "or use torch.no_grad() if only the value is wanted",
            )
        return False  # no trained parameters: the caller only wants the value
    if not any(graph.depends(t.y, x) for t in targets for x in t.xs):
        cause = f"the differentiated output does not depend on the {unused}"
    elif kink:
        cause = (
            f"order {order} of a piecewise-linear net ({kink}) is zero everywhere: use a smooth "
            "activation (GELU, SiLU, softplus, tanh), or order=1"
        )
        if order == 1:
            cause = (
                f"the expression holds derivatives of a piecewise-linear net ({kink}), and the "
                "next one is zero everywhere: use a smooth activation (GELU, SiLU, softplus, tanh)"
            )
    else:
        cause = (
            f"the derivative of order {order} does not depend on them. Is the function linear or a "
            "polynomial of that degree, or does it use a gradient taken without "
            "create_graph=True, a detached tensor, or reentrant checkpointing?"
        )
    raise UntrainedError("piecewise-linear" if kink else "untrained", cause)


class UntrainedError(FoundError):
    """A penalty trains nothing.

    Args:
        code: of the finding.
        cause: "why: fix".
    """

    def __init__(self, code: str, cause: str) -> None:
        found = error(code, cause)
        super().__init__(replace(found, why=UNTRAINED + found.why))


def is_frozen(f: Any, targets: Sequence[Target]) -> bool:
    """Whether a net with parameters was run, and none of them requires grad."""
    if not callable(f) or isinstance(f, Tensor):
        return any(_saves_parameters(node) for t in targets for node in graph.nodes(t.y))
    modules = [f] if isinstance(f, nn.Module) else reached(f)[0]
    parameters = [p for module in modules for p in module.parameters()]
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _saves_parameters(node: Any) -> bool:
    """Whether an operation has saved a parameter or a view of one, as those of a frozen net do."""
    if packs_saved(node):
        return False
    names = [n.removeprefix("_saved_") for n in dir(node) if n.startswith("_saved_")]
    found = [value for name in names if isinstance(value := saved(node, name), Tensor)]
    return any(isinstance(t, nn.Parameter) for x in found for t in (x, base_of(x)))


def warn_of_bias(form: Form, estimator: Estimator, target: Target, order: int) -> None:
    """Warn of a form that bends a random estimate of n²: it is right on average for n² alone."""
    if not estimator.is_random(target, order) or _is_linear(form):
        return
    why = (
        f"form={type(form).__name__} is not linear in n², and estimator={type(estimator).__name__} "
        "gives a random estimate of n²: the root of an estimate is not the estimate of the root. "
        'Use estimator="exact", form="squared", or more draws (the bias falls as 1/n)'
    )
    warnings.warn(FoundWarning(Finding("biased-estimate", "warning", why)), stacklevel=2)


def _is_linear(form: Form) -> bool:
    """Whether a form is a multiple of n², plus a constant."""
    if not isinstance(getattr(form, "center", 0), (int, float)):
        return False  # a tensor or an average
    n2 = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    values = form.value(n2)
    return torch.allclose(values - values[0], (values[1] - values[0]) * n2)


def require_gradient(penalty: Tensor, leaves: Sequence[Tensor]) -> None:
    """Take the gradient of a penalty once, to find what has none before the user's backward pass.

    Raises:
        FoundError: if an operation has no second derivative, or the gradient is not finite.
    """
    if not penalty.requires_grad:
        return
    grads = first_gradients(penalty, tuple(leaves))
    if penalty.isfinite() and not all(g.isfinite().all() for g in grads if g is not None):
        why = "the gradient of the penalty is not finite, though its value is"
        fix = "is there a root or a norm of something that is zero?"
        raise FoundError(Finding("not-finite", "error", why, fix))


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
