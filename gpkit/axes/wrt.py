"""The axis `wrt`: the variables of the derivative. `inputs` here, `weights` in ``parameters``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.axes.at import Points, as_points, require_floating
from gpkit.axes.call import Axes, Call
from gpkit.axes.of import require_one_output, scores_of
from gpkit.axes.scope import require_groups, require_images
from gpkit.estimators.base import Begun, Recomputable, Series, Target


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
    keys: tuple[str, ...] = ()  # the entries of a dict of samples that are meant; () for all
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


@dataclass(frozen=True, init=False, repr=False)
class inputs(Variables):
    """The inputs of a function: one tensor ``[B, *S]`` or several. The groups are the samples.

    ``inputs("a", "b")`` are these entries of a dict of inputs, with one norm over both; the other
    entries, which may be labels or masks, are constants. In `gpkit.PenalizedModule` they are
    entries of the batch.

    With ``scope="pixel"`` the inputs are ``[B, C, *S]``, and the groups are the pixels of all
    samples. A function that returns a list of scores, as critics at several scales do, has the sum
    of the penalties of each.

    Args:
        *keys: the entries that are the variables; without any, all inputs are.
        batch_dim: the dimension of the batch in each input, such as 1 for time-major sequences
            ``[T, B, F]``. The output has the batch first in any case.

    Raises:
        ValueError: if ``batch_dim`` is not an integer >= 0, or a key is there twice.
        TypeError: if a key is no string.

    >>> import gpkit, torch
    >>> net = torch.nn.GRU(3, 4)  # time-major
    >>> x = torch.randn(5, 2, 3)  # 5 steps of 2 sequences
    >>> penalty = gpkit.GradientPenalty(wrt=inputs(batch_dim=1))
    >>> penalty.terms(lambda x: net(x)[0][-1], x).norms.shape
    torch.Size([2])
    >>> f = lambda batch: (batch["x"] * batch["c"]).sum(1) * batch["scale"]
    >>> batch = {"x": torch.ones(2, 3), "c": torch.ones(2, 3), "scale": torch.tensor([1, 2])}
    >>> gpkit.GradientPenalty(wrt=inputs("x", "c")).terms(f, batch).squared_norms.tolist()
    [6.0, 24.0]
    """

    keys: tuple[str, ...] = field(default=(), init=False, repr=False)
    batch_dim: int = field(default=0, kw_only=True, repr=False)

    scopes = ("sample", "pixel")
    missing = (
        "call x.requires_grad_() before the forward pass, and give the penalty the same tensors"
    )

    def __init__(self, *keys: str, batch_dim: int = 0) -> None:
        for key in keys:
            if not isinstance(key, str):
                raise TypeError(
                    f"`inputs(...)` takes names of entries, inputs('a', 'b'); got {key!r}"
                )
        if len(set(keys)) < len(keys):
            raise ValueError(f"`inputs(...)` must name each entry once; got {list(keys)}")
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "batch_dim", batch_dim)
        checks.integer("inputs(batch_dim=...)", batch_dim, 0)

    def __repr__(self) -> str:
        return f"inputs({', '.join(map(repr, self.keys))})"

    def targets(self, call: Call) -> Iterator[Target]:
        """Yield one target for each score, with ``y`` ``[B, m]``: a row for each sample."""
        if len(call.args) > 1 + bool(call.axes.named):
            raise TypeError(
                "an input penalty takes f and the samples; several inputs go into one tuple: "
                f"penalty(f, (x1, x2)); got {len(call.args)} arguments after f"
            )
        evaluate: Callable[..., Tensor] | None = None
        series: Sequence[Series | None] | None = None
        mean = isinstance(call.f, Recomputable) and call.f.mean
        if isinstance(call.f, Recomputable) and call.f.value is not None and not call.axes.at.moves:
            xs = self.given(call)
            y = call.selected(call.f.value)
            graph.require_within(y, xs)
            evaluate = partial(self.evaluated, call, xs, xs)
            self.prove(call, y, xs)
        elif call.has_graph:
            xs = self.given(call)
            y = call.selected(call.f)
            graph.require_within(y, xs)
        elif callable(call.f) or isinstance(call.f, Recomputable):
            given = self.points(call)
            begun = None if mean else self.begun(call, given)
            if begun is None:
                y, caught = call.run(self.placed(given), given[0].device)
                xs = self.chosen(given, caught)
                self.prove(call, y, given)
            else:
                y, xs, series = begun.scores, given, begun.series
                self.prove(call, y, begun.at)
            evaluate = partial(self.evaluated, call, given, xs)
        else:
            raise TypeError(f"expected a tensor or a callable; got a {type(call.f).__name__}")
        if mean:
            yield Target(summed(y, xs), xs, True, evaluate, mean=True)
            return
        weights = call.axes.at.weights(*self.samples(call)) if call.axes.at.moves else None
        scores = scores_of(y)
        groups = call.given.groups if call.given is not None else None
        for i, score in enumerate(scores):
            again = evaluate and partial(evaluate, score=i)
            for target in self.targets_of(score, xs, call.axes, again, groups):
                target.weights, target.scores, target.steps = weights, len(scores), call.steps
                target.series = None if series is None else series[i]
                yield target

    def targets_of(
        self,
        y: Tensor,
        xs: Points,
        axes: Axes,
        evaluate: Callable[..., Tensor] | None = None,
        groups: Tensor | None = None,
    ) -> list[Target]:
        """Return one target for outputs ``y`` with a graph."""
        if groups is not None:
            require_groups(groups, y, xs, axes)
        pixels = axes.scope == "pixel"
        if pixels:
            require_images(xs)
        columns = self.columns(y, len(xs[0] if groups is None else y))
        if columns.shape[1] > 1 and axes.estimator.frobenius and not callable(axes.of):
            require_one_output(axes.form, columns)
        return [Target(columns, xs, True, evaluate, pixels=pixels, groups=groups)]

    def begun(self, call: Call, xs: Points) -> Begun | None:
        """Let the estimator run the function first; None if the value at ``xs`` is asked for."""
        begin, given = call.axes.estimator.begun, call.given
        if begin is None or call.axes.named or call.axes.of == "sampled_loss":
            return None  # labels are drawn from the value at xs
        groups = None if given is None else given.groups

        def scores(*at: Tensor) -> list[Tensor]:
            found = scores_of(call.run(self.placed(at), at[0].device)[0])
            batch = len(at[0])
            return [self.columns(y, batch if groups is None else len(y)) for y in found]

        metrics = None if given is None else given.metrics_at(xs)
        return begin(scores, xs, call.axes.order, call.rng, call.axes.evaluated_at, metrics)

    def points(self, call: Call) -> Points:
        """Return the points where the function is evaluated."""
        return call.axes.at(*self.samples(call), call.rng)

    def chosen(self, xs: Points, caught: Mapping[str, Tensor]) -> Points:
        """Return the variables of a forward pass at ``xs``."""
        return xs

    def prove(self, call: Call, y: Any, xs: Points) -> None:
        """Refuse a function that is run again and gives another value at the same points."""
        if call.is_unproven():
            again, _ = call.run(self.placed(xs), xs[0].device)
            for before, after in zip(scores_of(y), scores_of(again), strict=True):
                call.prove(before, after.reshape(before.shape))

    def evaluated(
        self, call: Call, given: Points, before: Points, *xs: Tensor, score: int = 0
    ) -> Tensor:
        """Return ``[B, m]`` at other points, with the same random numbers each time.

        Args:
            call: the function.
            given: the points where it was evaluated.
            before: the variables there.
            *xs: the variables now.
            score: which of several scores is returned.
        """
        y = self.moved_to(call, given, before, xs)
        if isinstance(call.f, Recomputable) and call.f.mean:
            return summed(y, xs)
        return self.columns(scores_of(y)[score], len(xs[0]))

    def moved_to(self, call: Call, given: Points, before: Points, xs: Points) -> Any:
        """Run the function with other variables; the arguments are those of `evaluated`."""
        return call.run(self.placed(xs), xs[0].device)[0]

    def placed(self, xs: Points) -> Points:
        """Return points ``[B, *S]`` as the function takes them."""
        return tuple(x.movedim(0, self.batch_dim) for x in xs) if self.batch_dim else xs

    def given(self, call: Call) -> Points:
        """Return the samples of a call with a graph; they must require grad."""
        if call.axes.at.moves:
            raise ValueError(
                f"`at={type(call.axes.at).__name__}()` needs a callable, to evaluate it "
                "there; got a tensor: use penalty(critic, real=real, fake=fake)"
            )
        real, fake = self.samples(call)
        if self.batch_dim:
            raise ValueError(
                "`inputs(batch_dim=...)` needs a callable, whose inputs it rearranges; got a "
                "tensor: use penalty(f, x), or transpose x before y is computed from it"
            )
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
            points = self.moved(args[0])
            fake = points if call.fake is None and not call.axes.at.moves else None
            return points, fake if call.fake is None else self.moved(call.fake)
        if call.real is None and call.fake is None:
            raise TypeError(
                "an input penalty needs samples: penalty(f, x) or penalty(f, real=..., fake=...); "
                "got none"
            )
        return (
            None if call.real is None else self.moved(call.real),
            None if call.fake is None else self.moved(call.fake),
        )

    def moved(self, given: Any) -> Points:
        """Return samples with the batch first."""
        k = self.batch_dim
        if not k:
            return as_points(given)
        points = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        if any(isinstance(x, Tensor) and x.ndim <= k for x in points):
            raise ValueError(
                f"`inputs(batch_dim={k})` needs inputs with more than {k} dimensions; got "
                f"{[list(x.shape) for x in points]}"
            )
        return as_points(tuple(x.movedim(k, 0) if isinstance(x, Tensor) else x for x in points))

    def columns(self, y: Tensor, batch: int) -> Tensor:
        """Return ``y`` as ``[B, m]``; raise a ValueError if it is not per sample."""
        if y.ndim == 0:
            raise ValueError(
                f"an input penalty needs one value per sample, [{batch}]; got a scalar: a mean "
                'hides a factor 1/B in every gradient. Use per-sample losses (reduction="none")'
            )
        if len(y) != batch:
            if len(y) > 1 and batch % len(y) == 0 and self.batch_dim == 0:
                raise ValueError(
                    f"an input penalty needs values per sample, [{batch}, ...]; got "
                    f"{list(y.shape)}: if the function holds labels or latents, let them follow "
                    f"the points, labels.repeat({batch // len(y)}). Is the batch the first "
                    "dimension? If not, use wrt=gpkit.inputs(batch_dim=1)"
                )
            raise ValueError(
                f"an input penalty needs values per sample, [{batch}, ...]; got {list(y.shape)}: "
                "is the batch the first dimension? For time-major inputs [T, B, ...] use "
                "wrt=gpkit.inputs(batch_dim=1); for several rows of one sample, groups="
            )
        if y.ndim == 2:
            return y
        return y.flatten(1) if y.ndim > 1 else y.unsqueeze(1)


def summed(mean: Tensor, xs: Points) -> Tensor:
    """Return B · mean ``[1, 1]``: the sum over the samples, from their mean."""
    return (mean * xs[0].shape[0]).reshape(1, 1)
