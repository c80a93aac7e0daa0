"""The axis `wrt`: the variables of the derivative. `inputs` here, `weights` in ``parameters``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.axes.at import Points, as_points, require_floating
from gpkit.axes.call import Axes, Call
from gpkit.axes.of import Of, require_one_output
from gpkit.axes.scope import require_images
from gpkit.estimators.base import Recomputable, Target


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
        if isinstance(call.f, Recomputable) and call.f.value is not None and not call.axes.at.moves:
            xs = self.given(call)
            y = call.selected(call.f.value)
            graph.require_within(y, xs)
            evaluate = partial(self.evaluated, call)
            self.prove(call, y, xs)
        elif call.has_graph:
            xs = self.given(call)
            y = call.selected(call.f)
            graph.require_within(y, xs)
        elif callable(call.f) or isinstance(call.f, Recomputable):
            given = self.points(call)
            y, caught = call.run(given, given[0].device)
            xs = self.chosen(given, caught)
            if xs is given:  # only inputs can be moved, not an activation
                evaluate = partial(self.evaluated, call)
                self.prove(call, y, xs)
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
        columns = self.columns(y, xs[0].shape[0], axes.of)
        if columns.shape[1] > 1 and axes.estimator.frobenius and not callable(axes.of):
            require_one_output(axes.form, columns)
        return [Target(columns, xs, True, evaluate, pixels=pixels)]

    def points(self, call: Call) -> Points:
        """Return the points where the function is evaluated."""
        return call.axes.at(*self.samples(call), call.rng)

    def chosen(self, xs: Points, caught: Mapping[str, Tensor]) -> Points:
        """Return the variables of a forward pass at ``xs``."""
        return xs

    def prove(self, call: Call, y: Tensor, xs: Points) -> None:
        """Refuse a function that is run again and gives another value at the same points."""
        if call.is_unproven():
            call.prove(y, call.run(xs, xs[0].device)[0])

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
        if y.shape[0] != batch:
            raise ValueError(
                f"an input penalty needs values per sample, [{batch}, ...]; got {list(y.shape)}"
            )
        if of == "loss" and y.numel() != batch:
            raise ValueError(
                f'of="loss" needs one value per sample, [{batch}] or [{batch}, 1]; got '
                f"{list(y.shape)}: for losses of steps or pixels choose their sum, "
                "losses.flatten(1).sum(1), or mean; for outputs gpkit.jacobian"
            )
        return y if y.ndim == 2 else y.reshape(batch, -1)  # which is one more node of the graph


def summed(mean: Tensor, xs: Points) -> Tensor:
    """Return B · mean ``[1, 1]``: the sum over the samples, from their mean."""
    return (mean * xs[0].shape[0]).reshape(1, 1)
