"""The parameters of a module as variables of the derivative: `gpkit.weights`, on the axis `wrt`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.compat import nodes_made
from gpkit.autodiff.layers.batch import may_be_wide
from gpkit.autodiff.layers.norms import applies
from gpkit.autodiff.layers.places import read
from gpkit.autodiff.layers.recording import Recording, recorded_layers
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.sharding.gathering import require_whole
from gpkit.autodiff.tracing.calls import RECORDS, TRACES, noted
from gpkit.axes.call import Axes, Call
from gpkit.axes.given.sample_weight import of_entries, sample_weights, weighted_mean
from gpkit.axes.mixtures import rows_of
from gpkit.axes.of import Of, require_losses
from gpkit.axes.wrt import Variables
from gpkit.estimators.base import Recomputable, Target
from gpkit.estimators.window import POOLED, Window


@dataclass(frozen=True)
class weights(Variables):
    """The parameters that require grad: all of them, or those whose names match a pattern.

    A complex parameter counts as its real and imaginary parts, so ‖g‖² is the sum of |g|².

    Args:
        match: a shell pattern for the names in ``module.named_parameters()``, such as "head.*".
            Any pattern but "*" needs a call with the module: ``penalty(loss, net)``.

    Raises:
        ValueError: in the call, if no parameter matches, or none of them requires grad.
        TypeError: in the call, if a pattern is used without the module.

    >>> import gpkit, torch
    >>> net = torch.nn.Linear(2, 1)
    >>> _ = torch.nn.init.constant_(net.bias, 3.0)
    >>> loss = net(torch.zeros(1, 2)).square().sum() / 2  # ∂L/∂bias = bias
    >>> gpkit.GradientPenalty(wrt=weights("bias"))(loss, net).item()
    9.0
    """

    match: str = "*"

    scopes = ("batch", "sample", *POOLED)
    batched = False
    missing = (
        "was it computed from other parameters, or under reentrant checkpointing? "
        "use checkpoint(..., use_reentrant=False)"
    )

    def targets(self, call: Call) -> Iterator[Target]:
        """Yield one target with G = 1 for the batch, or one for each sample."""
        if call.real is not None or call.fake is not None:
            raise TypeError("a weight penalty takes no real= or fake=: penalty(loss, net)")
        if len(call.args) != 1:
            raise TypeError(
                "a weight penalty takes a loss and the module or its parameters: "
                f"penalty(loss, net.parameters()); got {len(call.args)} arguments after the loss"
            )
        params = self.chosen(call.args[0])
        if has_ranks():
            require_whole(params, "a penalty in the weights")
        device, rerun, layers = params[0].device, None, None
        if isinstance(call.f, Recomputable) and call.f.value is not None:
            y = call.f.value if call.f.selected else call.selected(call.f.value)
            layers = call.f.layers
            rerun = partial(self.evaluated, call, device, y)
        elif call.has_graph:
            y = call.selected(call.f)
            layers = read(y, params) if reads_graph(call.axes) else None
        elif callable(call.f) or isinstance(call.f, Recomputable):
            # What recomputes a value may run its samples one by one, as the callback does.
            net = None if isinstance(call.f, Recomputable) else call.args[0]
            with layers_for([call.axes], net) as layers:
                y = self.evaluated(call, device)
            rerun = partial(self.evaluated, call, device, y)
        else:
            raise TypeError(f"expected a tensor or a callable; got a {type(call.f).__name__}")
        if rerun is not None:
            pooled = isinstance(call.f, Recomputable) and call.f.window is not None
            if call.is_unproven(reruns=pooled):
                since = nodes_made()
                call.prove(y, again := rerun())
                graph.require_new(again, params, since)
            if layers is not None and reads_graph(call.axes):
                layers = read(y, params)
        if any(p.grad_fn is not None for p in params):
            graph.require_within(y, params)
        weights = None if call.given is None else call.given.sample_weight
        layers = layers if call.given is None else None
        if layers is not None and self.by_layers(y, params, call.axes, layers):
            y = y if call.axes.scope == "sample" else y.mean()
            rows = self.part(call, y)
            yield Target(y.reshape(-1, 1), params, False, layers=layers, rows=rows)
        else:
            window = call.window()
            targets = self.targets_of(y, params, call.axes, rerun, window, weights)
            targets[0].steps = call.steps
            rows = self.part(call, y)
            yield from targets if rows is None else [targets[i] for i in rows.tolist()]

    def part(self, call: Call, y: Tensor) -> Tensor | None:
        """Return which of the samples' losses are taken; None for all."""
        fraction = call.axes.subsample
        return None if fraction is None else rows_of(len(y), fraction, call.rng, y.device)

    def by_layers(
        self, y: Tensor, params: tuple[Tensor, ...], axes: Axes, layers: Recording
    ) -> bool:
        """Whether the norms can be taken from the inputs and outputs of the layers."""
        if not reads_layers(axes) or y.numel() != (len(y) if y.ndim else 1):
            return False
        if axes.scope == "batch":
            return bool(layers.calls)
        return y.numel() > 0 and y.ndim > 0 and noted(partial(applies, layers, y, params))

    def targets_of(
        self,
        y: Tensor,
        params: tuple[Tensor, ...],
        axes: Axes,
        rerun: Callable[[], Tensor] | None = None,
        window: Window | None = None,
        weights: Tensor | None = None,
    ) -> list[Target]:
        """Return the targets for a loss ``y`` with a graph: one for each group."""
        groups = self.groups(y, axes.of, axes.scope, weights)
        evaluates: list[Any] = [None] * len(groups)
        if rerun is not None:
            again = partial(self.group, axes, rerun, weights)
            evaluates = [partial(again, i) for i in range(len(groups))]
        pairs = zip(groups, evaluates, strict=True)
        return [Target(group, params, False, evaluate, window=window) for group, evaluate in pairs]

    def evaluated(self, call: Call, device: torch.device, before: Tensor | None = None) -> Tensor:
        """Return the loss at the current weights; it must not be the tensor ``before``."""
        y, _ = call.run((), device)
        if y is before:
            raise RuntimeError(
                "the closure returned the same tensor twice: compute the loss inside the closure"
            )
        return y

    def group(
        self, axes: Axes, rerun: Callable[[], Tensor], weights: Tensor | None, i: int
    ) -> Tensor:
        """Recompute and return the output to differentiate for the i-th group."""
        return self.groups(rerun(), axes.of, axes.scope, weights)[i]

    def groups(self, y: Tensor, of: Of, scope: str, weights: Tensor | None = None) -> list[Tensor]:
        """Return the output to differentiate, ``[1, m]``, for each group."""
        if of == "loss" and y.numel() != (len(y) if y.ndim else 1):  # of steps [B, *T]
            require_losses(y)
            weights = None if weights is None else of_entries(weights, y)
            y = y.flatten()
        if scope == "sample":
            if y.ndim == 0:
                raise ValueError(
                    'scope="sample" needs one loss per sample, [B]; got a scalar: use '
                    'reduction="none"'
                )
            return list(y.reshape(len(y), 1, -1).unbind(0)) if len(y) else [y.sum().reshape(1, 1)]
        if scope in POOLED and y.numel() != (len(y) if y.ndim else 1):
            raise ValueError(
                f"scope={scope!r} needs one number, or losses [B]; got {list(y.shape)}"
            )
        if weights is not None and scope == "batch":
            if y.ndim == 0:
                raise ValueError(
                    "sample_weight= of a weight penalty needs losses [B]; got one number, their "
                    "mean: weigh the samples in the loss, or give the penalty the losses"
                )
            return [weighted_mean(y, sample_weights(weights, len(y))).reshape(1, -1)]
        return [y.reshape(1, 1) if y.numel() == 1 else y.mean(0).reshape(1, -1)]

    def chosen(self, given: Any) -> tuple[Tensor, ...]:
        """Return the parameters that match the pattern and require grad."""
        if self.match == "*":
            return self.named(given)
        return noted(partial(self.named, given))  # a graph cannot match names

    def named(self, given: Any) -> tuple[Tensor, ...]:
        """Return the same, looked up."""
        if isinstance(given, nn.Module):
            named = dict(given.named_parameters())
        elif self.match != "*":
            raise TypeError(
                f"`weights({self.match!r})` selects by name: pass the module, not tensors"
            )
        else:
            named = {str(i): p for i, p in enumerate(parameters_of(given))}
        chosen: dict[str, Any] = named
        if self.match != "*":
            chosen = {n: p for n, p in named.items() if fnmatch.fnmatchcase(n, self.match)}
        if not named:
            raise ValueError(
                "a weight penalty needs parameters; got none: is it a generator that was used up? "
                "Give the penalty the module, or list(net.parameters())"
            )
        if not chosen:
            hint = checks.nearest(self.match, named)
            raise ValueError(
                f"`weights({self.match!r})` matches none of {len(named)} parameters{hint}"
            )
        for name, p in chosen.items():
            if not isinstance(p, Tensor):
                raise TypeError(
                    "a weight penalty takes a module or its parameters; "
                    f"number {name} is a {type(p).__name__}"
                )
        # A tensor that is passed twice, such as a tied weight of two modules, counts once.
        trained = tuple({id(p): p for p in chosen.values() if p.requires_grad}.values())
        if not trained:
            raise ValueError(f"none of the {len(chosen)} parameters requires grad: all are frozen")
        return trained


def parameters_of(given: Any) -> list[Any]:
    """Return the parameters that a call names without a module.

    Raises:
        TypeError: if it is no tensor, and has none.
    """
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):  # of functional_call, or named_parameters as a dict
        return list(given.values())
    if not isinstance(given, Iterable):
        kind = type(given).__name__
        hint = ", or the net's own" if hasattr(given, "param_groups") else ""
        raise TypeError(
            f"a weight penalty takes a module or its parameters{hint}; got a {kind}: "
            "penalty(loss, net) or penalty(loss, net.parameters())"
        )
    found = list(given)
    pairs = [p for p in found if isinstance(p, tuple) and len(p) == 2]
    return [p for _, p in pairs] if found and len(pairs) == len(found) else found


def reads_layers(axes: Axes) -> bool:
    """Whether the norms can be taken from the inputs and outputs of layers."""
    by_layer = axes.scope in ("sample", "batch") and axes.estimator.by_layer
    return by_layer and not axes.wrt.batched and axes.order == 1 and axes.form.norm == "l2"


def reads_graph(axes: Axes) -> bool:
    """Whether the products with wide weights can be read from the graph of a loss."""
    return axes.scope == "batch" and reads_layers(axes) and not (TRACES or RECORDS or has_ranks())


def layers_for(penalties: Iterable[Axes], net: Any) -> AbstractContextManager[Recording | None]:
    """Return a context for a forward pass that records the layers that penalties can use."""
    scopes = {axes.scope for axes in penalties if reads_layers(axes)}
    if not scopes or not isinstance(net, nn.Module):
        return nullcontext()
    if scopes == {"batch"} and not (TRACES or RECORDS or has_ranks()):
        return nullcontext(Recording(net))  # the graph tells the same, see `reads_graph`
    return recorded_layers(net, None if "sample" in scopes else may_be_wide)
