"""Training steps with and without a penalty, on one batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpkit.autodiff.state import in_double
from gpkit.compiling.entry import compile
from gpkit.gradient_penalty import GradientPenalty
from gpkit.penalty import Penalty


class Steps:
    """The steps of a net on a batch.

    Args:
        net: is not changed, except that ``.grad`` is set to None.
        x: ``[B, *S]``.
        y: the targets ``[B, ...]``, or None: then the mean square of the output is trained on.
        losses: (output, y) -> ``[B]``; None is the cross-entropy for integers, else the square.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        losses: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.net, self.x, self.y, self.given = net, x, y, losses

    def losses(self, output: Tensor, y: Tensor | None) -> Tensor:
        """Return the loss of each sample, ``[B]``."""
        if y is None:
            return output.flatten(1).square().mean(1) if output.ndim > 1 else output.square()
        if self.given is not None:
            return self.given(output, y)
        if not y.is_floating_point():
            return F.cross_entropy(output, y, reduction="none")
        return (output - y).flatten(1).square().mean(1) if y.ndim > 1 else (output - y).square()

    def plain(self) -> None:
        """Take a step without a penalty."""
        self.net.zero_grad()
        self.losses(self.net(self.x), self.y).mean().backward()

    def penalised(self, penalty: Penalty) -> None:
        """Take a step with a penalty."""
        self.net.zero_grad()
        self.total(penalty).backward()

    def total(self, penalty: Penalty) -> Tensor:
        """Return the loss with a penalty."""
        if self._together(penalty):
            total: Tensor = penalty.with_loss(self._closure(penalty), self.net)  # type: ignore[attr-defined]
            return total
        return self.losses(self.net(self.x), self.y).mean() + self.penalty(penalty)

    def compiled(self, penalty: Penalty) -> tuple[Callable[[], None] | None, str]:
        """Return a step with a penalty as one graph, and why there is none, see `gpkit.compile`."""
        try:
            total = compile(lambda net: self.total(penalty), measure=False)
        except RuntimeError as error:
            return None, str(error)
        with warnings.catch_warnings(action="ignore"):  # a reason is returned
            total(self.net)

        def step() -> None:
            self.net.zero_grad()
            total(self.net).backward()

        return (None, total.obstacle) if total.obstacle else (step, "")

    def penalty(self, penalty: Penalty) -> Tensor:
        """Return the penalty, which runs the net itself.

        Raises:
            TypeError: if it compares environments.
        """
        if not isinstance(penalty, GradientPenalty):
            raise TypeError(f"{penalty.name} compares environments, which a batch does not have")
        net = [self.net] if penalty.named else []
        if not penalty.wrt.batched:
            return penalty(self._closure(penalty), self.net)
        x = self.x.detach()
        reads = penalty.at.reads
        given = {"real": x, "fake": x.roll(1, 0)}
        if penalty.of == "loss":
            return penalty(lambda z: self.losses(self.net(z), self.y), x, *net)
        if penalty.at.moves and "fake" in reads:
            real = given["real"] if "real" in reads else None
            return penalty(self.net, *net, real=real, fake=given["fake"])
        return penalty(self.net, x, *net)

    def gradient(self, penalty: Penalty) -> Tensor:
        """Return the gradient of a penalty in the parameters, as one vector."""
        value = self.penalty(penalty)
        params = [p for p in self.net.parameters() if p.requires_grad]
        grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    def in_float64(self) -> Steps:
        """Return the same steps of a copy in float64."""
        x, y = self.x, self.y
        y = y.double() if y is not None and y.is_floating_point() else y
        x = x.double() if x.is_floating_point() else x
        return Steps(in_double(self.net), x, y, self.given)

    def _together(self, penalty: Penalty) -> bool:
        of_loss = isinstance(penalty, GradientPenalty) and penalty.of != "sampled_loss"
        return of_loss and not penalty.wrt.batched and not penalty.named  # type: ignore[attr-defined]

    def _closure(self, penalty: Any) -> Callable[[], Tensor]:
        if penalty.of == "sampled_loss":
            return lambda: self.net(self.x)
        whole = penalty.scope != "sample"

        def closure() -> Tensor:
            losses = self.losses(self.net(self.x), self.y)
            return losses.mean() if whole else losses

        return closure


def pair_of(example: Any) -> tuple[Tensor, Tensor | None]:
    """Return x and y of a batch.

    Raises:
        TypeError: if it is neither a tensor nor two.
    """
    pair = tuple(example) if isinstance(example, (tuple, list)) else (example, None)
    if len(pair) != 2 or not isinstance(pair[0], Tensor):
        kinds = ", ".join(type(part).__name__ for part in pair if part is not None)
        raise TypeError(f"bench(example=...) must be a tensor x, or (x, y); got {kinds}")
    return pair


@contextmanager
def keeping_buffers(net: nn.Module) -> Iterator[None]:
    """A context after which the buffers of a net have the values from before."""
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        for buffer, kept in before:
            buffer.data.copy_(kept)
