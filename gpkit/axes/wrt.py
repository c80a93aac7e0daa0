"""The axis `wrt`: the variables of the derivative."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.layers.norms import applies
from gpkit.autodiff.layers.recording import recorded_layers
from gpkit.axes.at import Points, as_points, require_floating
from gpkit.axes.call import Axes, Call
from gpkit.axes.of import Of
from gpkit.axes.scope import require_images
from gpkit.estimators.base import Recomputable, Target
from gpkit.estimators.window import POOLED, Window


class Variables:
    """The variables of the derivative. The base class of `wrt`.

    A subclass defines one method, `targets`.

    >>> import gpkit, torch
    >>> from gpkit.estimators.base import Target
    >>> class second_argument(Variables):  # differentiates f with respect to args[1] only
    ...     def targets(self, call):
    ...         x, c = call.args
    ...         c = c.detach().requires_grad_()
    ...         yield Target(call.f(x, c).reshape(-1, 1), (c,), batched=True)
    >>> penalty = gpkit.GradientPenalty(wrt=second_argument())
    >>> x, c = torch.full((4, 1), 3.0), torch.ones(4, 1)
    >>> penalty(lambda x, c: (x * c).sum(1), x, c).item()  # ‖∂f/∂c‖² = x²
    9.0
    """

    scopes: tuple[str, ...] = ("sample",)  # the valid scopes; the first is the default
    batched = True  # True for inputs ``[B, *S]`` with one row per group, False for parameters
    missing = "was the output computed from it?"  # the hint if y does not depend on them

    def targets(self, call: Call) -> Iterable[Target]:
        """Return the outputs to differentiate, with their variables, for a call of a penalty.

        Args:
            call: the function, samples and parameters of the call.

        Returns:
            The targets: one for all groups, or one for each group.

        Raises:
            NotImplementedError: if a subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define targets(call)")


@dataclass(frozen=True)
class inputs(Variables):
    """The inputs of a function: one tensor ``[B, *S]`` or several. The groups are the samples.

    With ``scope="pixel"`` the inputs are ``[B, C, *S]``, and the groups are the pixels of all
    samples.
    """

    scopes = ("sample", "pixel")
    missing = (
        "call x.requires_grad_() before the forward pass, and give the penalty the same tensors"
    )

    def targets(self, call: Call) -> Iterator[Target]:
        """Yield one target, with ``y`` ``[B, m]``: a row for each sample."""
        if len(call.args) > 1 + bool(call.axes.named):
            raise TypeError(
                "an input penalty takes f and the samples; several inputs go into one tuple: "
                f"penalty(f, (x1, x2)); got {len(call.args)} arguments after f"
            )
        evaluate: Callable[..., Tensor] | None = None
        mean = isinstance(call.f, Recomputable) and call.f.mean
        if isinstance(call.f, Recomputable) and not call.axes.at.moves:
            xs = self.given(call)
            y = call.selected(call.f.value)
            evaluate = partial(self.evaluated, call)
        elif call.has_graph:
            xs = self.given(call)
            y = call.selected(call.f)
        elif callable(call.f) or isinstance(call.f, Recomputable):
            given = self.points(call)
            y, caught = call.run(given, given[0].device)
            xs = self.chosen(given, caught)
            if xs is given:  # only inputs can be moved, not an activation
                evaluate = partial(self.evaluated, call)
        else:
            raise TypeError(f"expected a tensor or a callable; got a {type(call.f).__name__}")
        if mean:
            yield Target(summed(y, xs), xs, True, evaluate, mean=True)
        else:
            yield from self.targets_of(y, xs, call.axes, evaluate)

    def targets_of(
        self, y: Tensor, xs: Points, axes: Axes, evaluate: Callable[..., Tensor] | None = None
    ) -> list[Target]:
        """Return one target for outputs ``y`` with a graph."""
        pixels = axes.scope == "pixel"
        if pixels:
            require_images(xs)
        columns = self.columns(y, len(xs[0]), axes.of)
        return [Target(columns, xs, True, evaluate, pixels=pixels)]

    def points(self, call: Call) -> Points:
        """Return the points where the function is evaluated."""
        return call.axes.at(*self.samples(call), call.rng)

    def chosen(self, xs: Points, caught: Mapping[str, Tensor]) -> Points:
        """Return the variables of a forward pass at ``xs``."""
        return xs

    def evaluated(self, call: Call, *xs: Tensor) -> Tensor:
        """Return ``[B, m]`` at other points, with the same random numbers each time."""
        y, _ = call.run(xs, xs[0].device)
        if isinstance(call.f, Recomputable) and call.f.mean:
            return summed(y, xs)
        return self.columns(y, len(xs[0]), call.axes.of)

    def given(self, call: Call) -> Points:
        """Return the samples of a call with a graph; they must require grad."""
        if call.axes.at.moves:
            raise ValueError(
                f"`at={type(call.axes.at).__name__}()` needs a callable, to evaluate it "
                "there; got a tensor: use penalty(critic, real=real, fake=fake)"
            )
        real, fake = self.samples(call)
        xs = call.axes.at.choose(real, fake, call.rng)
        for x in xs:
            require_floating(x)
            if not x.requires_grad:
                raise ValueError(
                    "the samples do not require grad; call x.requires_grad_() before the forward "
                    "pass, or give the penalty the function itself: penalty(f, x)"
                )
        return xs

    def samples(self, call: Call) -> tuple[Points | None, Points | None]:
        """Return the real and fake samples; a positional argument holds the points themselves."""
        args = call.args
        if call.axes.named:  # the last argument may be the module
            args = args[:-1] if args and isinstance(args[-1], nn.Module) else args
        if args:
            if call.real is not None or (call.fake is not None and not call.axes.at.moves):
                raise TypeError("pass the samples once: by position, or as real=... and fake=...")
            points = as_points(args[0])
            fake = points if call.fake is None and not call.axes.at.moves else None
            return points, fake if call.fake is None else as_points(call.fake)
        if call.real is None and call.fake is None:
            raise TypeError(
                "an input penalty needs samples: penalty(f, x) or penalty(f, real=..., fake=...); "
                "got none"
            )
        return (
            None if call.real is None else as_points(call.real),
            None if call.fake is None else as_points(call.fake),
        )

    def columns(self, y: Tensor, batch: int, of: Of) -> Tensor:
        """Return ``y`` as ``[B, m]``; raise a ValueError if it is not per sample."""
        if y.ndim == 0:
            raise ValueError(
                f"an input penalty needs one value per sample, [{batch}]; got a scalar: a mean "
                'hides a factor 1/B in every gradient. Use per-sample losses (reduction="none")'
            )
        if len(y) != batch:
            raise ValueError(
                f"an input penalty needs values per sample, [{batch}, ...]; got {list(y.shape)}"
            )
        if of == "loss" and y.numel() != batch:
            raise ValueError(
                f'of="loss" needs one value per sample, [{batch}] or [{batch}, 1]; got '
                f"{list(y.shape)}: use per-sample losses, or gpkit.jacobian for outputs"
            )
        return y.reshape(batch, -1)


def summed(mean: Tensor, xs: Points) -> Tensor:
    """Return B · mean ``[1, 1]``: the sum over the samples, from their mean."""
    return (mean * xs[0].shape[0]).reshape(1, 1)


@dataclass(frozen=True)
class weights(Variables):
    """The parameters that require grad: all of them, or those whose names match a pattern.

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
        device, rerun, layers = params[0].device, None, None
        if isinstance(call.f, Recomputable):
            y, layers = call.selected(call.f.value), call.f.layers
            rerun = partial(self.evaluated, call, device, y)
        elif call.has_graph:
            y = call.selected(call.f)
        elif callable(call.f):
            net = call.args[0]
            record = isinstance(net, nn.Module) and reads_layers(call.axes)
            with recorded_layers(net) if record else nullcontext() as layers:
                y = self.evaluated(call, device)
            rerun = partial(self.evaluated, call, device, y)
        else:
            raise TypeError(f"expected a tensor or a callable; got a {type(call.f).__name__}")
        if layers is not None and y.ndim and y.numel() == len(y) and applies(layers, y, params):
            yield Target(y.reshape(-1, 1), params, False, layers=layers)
        else:
            yield from self.targets_of(y, params, call.axes, rerun, call.window())

    def targets_of(
        self,
        y: Tensor,
        params: tuple[Tensor, ...],
        axes: Axes,
        rerun: Callable[[], Tensor] | None = None,
        window: Window | None = None,
    ) -> list[Target]:
        """Return the targets for a loss ``y`` with a graph: one for each group."""
        groups = self.groups(y, axes.of, axes.scope)
        evaluates = [rerun and partial(self.group, axes, rerun, i) for i in range(len(groups))]
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

    def group(self, axes: Axes, rerun: Callable[[], Tensor], i: int) -> Tensor:
        """Recompute and return the output to differentiate for the i-th group."""
        return self.groups(rerun(), axes.of, axes.scope)[i]

    def groups(self, y: Tensor, of: Of, scope: str) -> list[Tensor]:
        """Return the output to differentiate, ``[1, m]``, for each group."""
        if of == "loss" and y.numel() != (len(y) if y.ndim else 1):
            raise ValueError(f'of="loss" needs a scalar or losses [B]; got {list(y.shape)}')
        if scope == "sample":
            if y.ndim == 0:
                raise ValueError(
                    'scope="sample" needs one loss per sample, [B]; got a scalar: use '
                    'reduction="none"'
                )
            return list(y.reshape(len(y), 1, -1).unbind(0))
        if scope in POOLED and y.numel() != (len(y) if y.ndim else 1):
            raise ValueError(
                f"scope={scope!r} needs one number, or losses [B]; got {list(y.shape)}"
            )
        return [y.reshape(1, 1) if y.numel() == 1 else y.mean(0).reshape(1, -1)]

    def chosen(self, given: Any) -> tuple[Tensor, ...]:
        """Return the parameters that match the pattern and require grad."""
        if isinstance(given, nn.Module):
            named = dict(given.named_parameters())
        elif self.match != "*":
            raise TypeError(
                f"`weights({self.match!r})` selects by name: pass the module, not tensors"
            )
        else:
            given = [given] if isinstance(given, Tensor) else list(given)
            named = {str(i): p for i, p in enumerate(given)}
        chosen: dict[str, Any] = named
        if self.match != "*":
            chosen = {n: p for n, p in named.items() if fnmatch.fnmatchcase(n, self.match)}
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


def reads_layers(axes: Axes) -> bool:
    """Whether each sample's norm can be taken from the inputs and outputs of the layers."""
    by_layer = axes.scope == "sample" and axes.estimator.by_layer and not axes.wrt.batched
    return by_layer and axes.order == 1 and axes.form.norm == "l2"


VARIABLES: dict[str, type[Variables]] = {"input": inputs, "weight": weights}
