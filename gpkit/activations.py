"""A named activation, as what is differentiated or as what it is differentiated in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gpkit.calls import Call
from gpkit.captures import Named
from gpkit.points import Points
from gpkit.variables import inputs


@dataclass(frozen=True)
class activation(Named, inputs):  # noqa: N801  axes read as functions: of=activation("encoder.3")
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
        points = call.at.choose(*self.samples(call), call.rng)
        if call.at.detach:
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
