"""The outputs of submodules, by name, for the axes `of` and `wrt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gpkit import checks
from gpkit.autodiff.activations import Named, moved
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.axes.at import Points
from gpkit.axes.call import Call
from gpkit.axes.wrt import Variables, inputs
from gpkit.estimators.base import Recomputable


class Inside(inputs):
    """The outputs of submodules as variables. The base class of `activation`."""

    missing = "is the submodule's output used? name a submodule that the output depends on"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the submodules."""
        return ()

    def points(self, call: Call) -> Points:
        """Return the points where the net is evaluated. They need not be floating-point."""
        points = call.axes.at.choose(*self.samples(call), call.rng)
        if call.axes.at.detach:
            points = tuple(x.detach() for x in points)
        return tuple(x.clone() if not TRACES and x.is_inference() else x for x in points)

    def chosen(self, xs: Points, caught: Mapping[str, Any]) -> Points:
        """Return h of each, which must have one row per sample.

        Raises:
            ValueError: if it does not.
        """
        for name in self.names:
            h = caught[name]
            if h.ndim == 0 or len(h) != len(xs[0]):
                raise ValueError(
                    f"`activation({name!r})` must have a row for each of {len(xs[0])} samples; "
                    f"got {list(h.shape)}"
                )
        return tuple(caught[name] for name in self.names)

    def moved_to(self, call: Call, given: Points, before: Points, xs: Points) -> Any:
        """Run the net at the same points, with other outputs of the submodules."""
        if isinstance(call.f, Recomputable):  # a trainer moves them itself
            return call.run(xs, xs[0].device)[0]
        changes = moved(self.names, xs, before)
        return call.run(self.placed(given), given[0].device, changes)[0]


@dataclass(frozen=True)
class activation(Named, Inside):
    """The output h of a submodule, ``[B, *H]``, for the axes ``of`` and ``wrt``.

    ``of=activation("encoder.3")`` differentiates h. ``wrt=activation("encoder.3")`` differentiates
    with respect to h, for each sample; the samples may then be integers, such as tokens before an
    embedding. A hook captures h in the forward pass that the penalty runs, so the penalty needs
    the module: ``penalty(net, x)``, or as the last argument,
    ``penalty(lambda x: losses(net(x)), x, net)`` and ``penalty(closure, net)``. If you have h with
    its graph, use ``penalty(losses, h)`` for ``wrt``, and ``gpkit.jacobian()(h, x)`` for ``of``.

    Args:
        name: as in ``net.named_modules()``. The forward pass must call that submodule once.

    Raises:
        ValueError: if the name is not a string or is empty; in the call, if the net has no such
            submodule, or the forward pass does not call it exactly once.
        TypeError: in the call, if its output is not a floating-point tensor, or if ``of`` names an
            activation and the penalty is given a tensor.

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

    def __call__(self, h: Tensor) -> Tensor:
        """Return h unchanged: on the axis ``of`` the activation itself is differentiated."""
        return h


@dataclass(frozen=True)
class activations(Inside):
    """The outputs of several submodules, with one norm over all of them.

    ``wrt=[activation("a"), activation("b")]`` is short for it.

    Args:
        parts: the activations.

    Raises:
        TypeError: if a part is anything else.
        ValueError: if there is none, or one of them twice.

    >>> import gpkit, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> both = gpkit.GradientPenalty(wrt=[activation("0"), activation("1")])
    >>> n2 = both(net, torch.ones(4, 2))  # ∂y/∂y = 1
    >>> torch.allclose(n2, net[1].weight.square().sum() + 1)
    True
    """

    parts: tuple[activation, ...]

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, activation):
                raise TypeError(
                    f"`wrt=[...]` is a list of gpkit.activation(...); got {part!r}; several inputs "
                    "are one tuple of the call, penalty(f, (x1, x2))"
                )
        if not self.parts or len(set(self.names)) < len(self.parts):
            raise ValueError(f"`wrt=[...]` must name each activation once; got {list(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(part.name for part in self.parts)


def as_wrt(where: str, wrt: Any, kinds: Mapping[str, type[Variables]]) -> Variables:
    """Return `Variables` for an object, a name in ``kinds``, or a list of activations.

    Raises:
        ValueError: if the name is not in ``kinds``.
        TypeError: if it is anything else.
    """
    if isinstance(wrt, Sequence) and not isinstance(wrt, str):
        return activations(tuple(wrt))
    found: Variables = checks.piece(where, wrt, kinds, Variables)
    return found
