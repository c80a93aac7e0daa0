"""The axis `wrt`: with respect to what."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.activations import Named
from gpkit.axes.at import Points, as_points, require_floating
from gpkit.axes.call import Axes, Call
from gpkit.axes.of import Of
from gpkit.axes.scope import POOLED, require_images
from gpkit.estimators.base import Target
from gpkit.estimators.recomputable import Recomputable
from gpkit.estimators.window import Window


class Variables:
    """With respect to what the derivative is taken: the base class of `wrt`.

    A subclass has one method, `targets`.
    """

    scopes: tuple[str, ...] = ("sample",)  # the groups that it can have, the first by default
    batched = True  # whether they are inputs ``[B, *S]``, a row for each group; else parameters
    missing = "is it what the function was computed from?"  # the advice where y does not depend

    def targets(self, call: Call) -> Iterable[Target]:
        """Return what is differentiated with respect to what, for what a penalty was called with.

        Args:
            call: the function, samples and parameters of the call.

        Returns:
            The targets: one for all groups, or one for each.

        Raises:
            NotImplementedError: if a subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define targets(call)")


@dataclass(frozen=True)
class inputs(Variables):
    """The inputs of a function: one tensor ``[B, *S]`` or several. Its groups are the samples.

    With ``scope="pixel"`` they are the pixels of all samples: inputs are ``[B, C, *S]``.
    """

    scopes = ("sample", "pixel")
    missing = "x.requires_grad_() must come before the forward, and the same tensors be given"

    def targets(self, call: Call) -> Iterator[Target]:
        """Yield the one target: ``y`` is ``[B, m]``, a row for each sample."""
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
            if xs is given:  # an activation cannot be moved by moving the inputs
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
        """Return the one target of outputs ``y`` whose graph is there."""
        pixels = axes.scope == "pixel"
        if pixels:
            require_images(xs)
        columns = self.columns(y, len(xs[0]), axes.of)
        return [Target(columns, xs, True, evaluate, pixels=pixels)]

    def points(self, call: Call) -> Points:
        """Return where a function is evaluated."""
        return call.axes.at(*self.samples(call), call.rng)

    def chosen(self, xs: Points, caught: Mapping[str, Tensor]) -> Points:
        """Return the variables of a forward that was made at ``xs``."""
        return xs

    def evaluated(self, call: Call, *xs: Tensor) -> Tensor:
        """Return ``[B, m]`` at some points; the same random numbers are drawn at all of them."""
        y, _ = call.run(xs, xs[0].device)
        if isinstance(call.f, Recomputable) and call.f.mean:
            return summed(y, xs)
        return self.columns(y, len(xs[0]), call.axes.of)

    def given(self, call: Call) -> Points:
        """Return the samples whose graph the caller already has."""
        if call.axes.at.moves:
            raise ValueError(
                f"`at={type(call.axes.at).__name__}()` needs the function itself, to evaluate it "
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
        """Return real and fake samples; one positional argument is the points themselves."""
        args = call.args
        if call.axes.named:  # the module that has them may come last
            args = args[:-1] if args and isinstance(args[-1], nn.Module) else args
        if args:
            if call.real is not None or (call.fake is not None and not call.axes.at.moves):
                raise TypeError("give the samples once: by position, or as real=... and fake=...")
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
        """Return ``[B, m]``, or refuse what is not per sample."""
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
    """Return the sum ``[1, 1]`` over the samples of what one number is the mean of."""
    return (mean * xs[0].shape[0]).reshape(1, 1)


@dataclass(frozen=True)
class weights(Variables):
    """The parameters that require grad: all of them, or those whose name matches a pattern.

    Args:
        match: a shell pattern for the names in ``module.named_parameters()``, as "head.*".
    """

    match: str = "*"

    scopes = ("batch", "sample", *POOLED)
    batched = False
    missing = (
        "was it computed from other parameters, or under reentrant checkpointing? "
        "use checkpoint(..., use_reentrant=False)"
    )

    def targets(self, call: Call) -> Iterator[Target]:
        """Yield one target of G = 1 for the batch, or one for every sample."""
        if call.real is not None or call.fake is not None:
            raise TypeError("a weight penalty takes no real= or fake=: penalty(loss, net)")
        if len(call.args) != 1:
            raise TypeError(
                "a weight penalty takes a loss and the module or its parameters: "
                f"penalty(loss, net.parameters()); got {len(call.args)} arguments after the loss"
            )
        params = self.chosen(call.args[0])
        device, rerun = params[0].device, None
        if isinstance(call.f, Recomputable):
            y = call.selected(call.f.value)
            rerun = partial(self.evaluated, call, device, y)
        elif call.has_graph:
            y = call.selected(call.f)
        elif callable(call.f):
            y = self.evaluated(call, device)
            rerun = partial(self.evaluated, call, device, y)
        else:
            raise TypeError(f"expected a tensor or a callable; got a {type(call.f).__name__}")
        yield from self.targets_of(y, params, call.axes, rerun, window_of(call))

    def targets_of(
        self,
        y: Tensor,
        params: tuple[Tensor, ...],
        axes: Axes,
        rerun: Callable[[], Tensor] | None = None,
        window: Window | None = None,
    ) -> list[Target]:
        """Return the targets of a loss ``y`` whose graph is there: one for each group."""
        groups = self.groups(y, axes.of, axes.scope)
        evaluates = [rerun and partial(self.group, axes, rerun, i) for i in range(len(groups))]
        pairs = zip(groups, evaluates, strict=True)
        return [Target(group, params, False, evaluate, window=window) for group, evaluate in pairs]

    def evaluated(self, call: Call, device: torch.device, before: Tensor | None = None) -> Tensor:
        """Return the loss at the weights as they are, or refuse one that was there ``before``."""
        y, _ = call.run((), device)
        if y is before:
            raise RuntimeError(
                "the closure gave the same tensor twice: the loss must be computed inside of it"
            )
        return y

    def group(self, axes: Axes, rerun: Callable[[], Tensor], i: int) -> Tensor:
        """Return what is differentiated for the i-th group, computed anew."""
        return self.groups(rerun(), axes.of, axes.scope)[i]

    def groups(self, y: Tensor, of: Of, scope: str) -> list[Tensor]:
        """Return what is differentiated for each group, ``[1, m]``, or refuse other shapes."""
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
        """Return the parameters that take part."""
        if isinstance(given, nn.Module):
            named = dict(given.named_parameters())
        elif self.match != "*":
            raise TypeError(f"`weights({self.match!r})` chooses by name: give it the module")
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
                    f"number {name} of them is a {type(p).__name__}"
                )
        trained = tuple(p for p in chosen.values() if p.requires_grad)
        if not trained:
            raise ValueError(f"none of the {len(chosen)} parameters requires grad: all are frozen")
        return trained


@dataclass(frozen=True)
class activation(Named, inputs):
    """The output h of a submodule, ``[B, *H]``: a choice on the axes ``of`` and ``wrt``.

    ``of=activation("encoder.3")`` differentiates it, ``wrt=activation("encoder.3")`` differentiates
    in it, for each sample. It is caught in the forward that the penalty makes, so that what is
    called must be the module that has it, ``penalty(net, x)``; or that module comes last,
    ``penalty(lambda x: losses(net(x)), x, net)``, ``penalty(closure, net)``. An h whose graph you
    have is given itself: ``penalty(h, x)`` on the axis ``of``, ``penalty(losses, h)`` on ``wrt``.
    The samples need not be differentiable where it is ``wrt``: tokens, before an embedding.

    Args:
        name: as in ``net.named_modules()``. The forward must call that submodule once.

    Raises:
        ValueError: if the name is no string; and in the call, if the net has no such submodule, or
            does not call it once.
        TypeError: in the call, if it gives no floating-point tensor.

    >>> import gpkit, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> x = torch.ones(4, 2)
    >>> first = gpkit.GradientPenalty(of=activation("0"))(net, x)
    >>> torch.allclose(first, net[0].weight.square().sum())
    True
    >>> second = gpkit.GradientPenalty(wrt=activation("0"))(net, x)
    >>> torch.allclose(second, net[1].weight.square().sum())
    True
    """

    missing = "is the submodule's output used? name one on the way to what is differentiated"

    def __call__(self, h: Tensor) -> Tensor:
        """Return h: where it is ``of``, what was caught, or was given, is differentiated as is."""
        return h

    def points(self, call: Call) -> Points:
        """Return where the net is evaluated. Its inputs need not be differentiable."""
        points = call.axes.at.choose(*self.samples(call), call.rng)
        if call.axes.at.detach:
            points = tuple(x.detach() for x in points)
        return tuple(x.clone() if x.is_inference() else x for x in points)

    def chosen(self, xs: Points, caught: Mapping[str, Any]) -> Points:
        """Return h, which must have a row for every sample.

        Raises:
            ValueError: if it has none.
        """
        h = caught[self.name]
        if h.ndim == 0 or len(h) != len(xs[0]):
            raise ValueError(
                f"`activation({self.name!r})` must have a row for each of {len(xs[0])} samples; "
                f"got {list(h.shape)}"
            )
        return (h,)


def window_of(call: Call) -> Window | None:
    """Return the window of a call whose scope asks for one.

    Raises:
        ValueError: if only the caller can know the micro-batches, and did not give them.
    """
    if call.axes.scope not in POOLED:
        return None
    if isinstance(call.f, Recomputable) and call.f.window is not None:
        return call.f.window
    if call.axes.scope == "accumulated":
        raise ValueError(
            'scope="accumulated" needs the micro-batches of an optimiser step, which '
            "gpkit.GradientPenaltyCallback sees; here use scope='batch' or 'global'"
        )
    return Window(ranks=True)


VARIABLES: dict[str, type[Variables]] = {"input": inputs, "weight": weights}
