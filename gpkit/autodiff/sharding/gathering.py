"""Keep the weights of FSDP2 modules gathered while derivatives of them are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.sharding.compat import (
    Resharding,
    begin_backward,
    is_fsdp2,
    manages,
    modules_in,
)

Gradients = tuple[Tensor | None, ...]


@contextmanager
def unsharded(*nets: nn.Module) -> Iterator[None]:
    """A context in which the weights of FSDP2 modules stay gathered, for derivatives by hand.

    ``fully_shard`` frees the gathered weights after a forward and after a backward pass. A
    derivative that is differentiated again needs them once more: torch then raises an error about a
    "storage of size 0". Run the forward pass, the derivative and the backward pass in this context,
    and the optimiser's step after it. Penalties that are called need no context: they gather the
    weights themselves. Here ``critic`` may be sharded, or not: then nothing is done::

        with gpkit.unsharded(critic):
            x.requires_grad_()
            slopes = gpkit.derivative(critic(x), x)
            ((slopes.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        optimizer.step()

    At the end, also after an exception, the weights are sharded again. An exception within a
    forward or backward pass discards the gradients that were being reduced, as
    ``reset_iter_state()`` of FSDP2 says.

    Args:
        *nets: modules; those to which ``fully_shard`` was applied are found in them.

    Yields:
        Nothing.

    >>> import gpkit, torch
    >>> net = torch.nn.Linear(2, 1)
    >>> with unsharded(net):  # not sharded: nothing is done
    ...     net(torch.ones(3, 2)).sum().backward()
    >>> net.weight.grad
    tensor([[3., 3.]])
    """
    resharding = Resharding(module for net in nets for module in net.modules())
    resharding.disable()
    try:
        yield
    except BaseException:
        resharding.reset()
        raise
    finally:
        resharding.restore()


def regathered(y: Tensor, grads: Gradients) -> Gradients:
    """Return gradients whose backward pass gathers the weights of FSDP2 modules first.

    The graph of a derivative reads the weights without the hooks by which FSDP2 gathers them. A
    backward pass goes through it before it comes to the forward pass, since that is older.

    Args:
        y: what was differentiated. Its graph may have been made by FSDP2.
        grads: the derivatives.

    Returns:
        The same gradients; None stays None.
    """
    given = [g for g in grads if g is not None and g.requires_grad]
    modules = [] if not given or torch.compiler.is_compiling() else modules_in(y)
    if not modules:
        return grads
    found = dict(zip(map(id, given), _Regathered.apply(modules, *given), strict=True))
    return tuple(found.get(id(g), g) for g in grads)


class _Regathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, modules: Sequence[Any], *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.modules = modules
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        for module in ctx.modules:
            begin_backward(module)
        return None, *grads


def is_sharded(net: nn.Module) -> bool:
    """Return whether FSDP2's ``fully_shard`` was applied to a module or to a submodule of it.

    >>> is_sharded(nn.Linear(2, 1))
    False
    """
    return any(map(is_fsdp2, net.modules()))


def reshard(net: nn.Module) -> None:
    """Free the gathered weights of the FSDP2 modules in a net, so that the next pass gathers them.

    After a forward pass alone the root stays gathered, and an optimiser's step would not reach it.
    """
    for module in net.modules():
        if is_fsdp2(module):
            module.reshard()  # type: ignore[operator]


def require_whole(parameters: Iterable[Tensor], what: str) -> None:
    """Refuse weights that FSDP2 manages: those in a graph are others, and exist while gathered.

    Args:
        parameters: the weights.
        what: what needs them, for the message.

    Raises:
        RuntimeError: if FSDP2 manages one of them.
    """
    if manages(parameters):
        raise RuntimeError(
            f"{what} needs whole weights, and FSDP2 has sharded them: use a penalty in the inputs, "
            "gpkit.GradientPenaltyCallback with estimator='finite_difference' and scope='global', "
            "or DistributedDataParallel"
        )


def require_no_hooks(y: Tensor, what: str) -> None:
    """Refuse an output that was computed by FSDP2 modules.

    Args:
        y: the output.
        what: what does not pass through their hooks, for the message.

    Raises:
        RuntimeError: if it was.
    """
    if modules_in(y):
        raise RuntimeError(
            f"{what} runs the net on Taylor series, which do not pass through the hooks of FSDP2: "
            "use estimator='projection' or 'exact'"
        )
