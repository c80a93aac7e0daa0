"""What the submodules of a net give, caught by name while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from gpkit import checks


@dataclass(frozen=True)
class Named:
    """The output of a submodule, named as in ``module.named_modules()``.

    Args:
        name: as "encoder.3".
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(
                f"`activation(name=...)` must be the name of a submodule, as 'encoder.3'; "
                f"got {self.name!r}"
            )


def names(*axes: Any) -> list[str]:
    """Return the names of the activations among the choices on some axes, each once."""
    return list(dict.fromkeys(axis.name for axis in axes if isinstance(axis, Named)))


def module_of(name: str, f: Any, args: Iterable[Any]) -> nn.Module:
    """Return the module whose activation is meant: one that was given, or that ``f`` is made of.

    Raises:
        TypeError: if there is none.
    """
    parts = f.args if isinstance(f, partial) else ()
    for owner in (*args, f, getattr(f, "__self__", None), *parts):
        if isinstance(owner, nn.Module):
            return owner
    raise TypeError(
        f"`activation({name!r})` needs the module that has it: penalty(net, x), or "
        f"penalty(f, x, net) for a function that runs it; got a {type(f).__name__} alone"
    )


@contextmanager
def captured(module: nn.Module | None, wanted: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Catch the outputs of submodules during one forward; no hook is left behind.

    What follows a submodule gets a copy of its output, so that an operation in place does not
    change what was caught. An output without a graph is caught as a leaf that requires grad.

    Args:
        module: the net; it may be None where nothing is wanted.
        wanted: names, as in ``module.named_modules()``.

    Yields:
        The outputs by name: complete when the block ends.

    Raises:
        ValueError: if a name is no submodule's, or it was not run, or more than once.
        TypeError: if a submodule gives no floating-point tensor.
    """
    caught: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in wanted:
            assert module is not None
            hook = partial(_catch, name, caught)
            stack.callback(submodule(module, name).register_forward_hook(hook).remove)
        yield caught
    for name in wanted:
        if name not in caught:
            raise ValueError(
                f"`activation({name!r})` was not computed: the forward does not call that "
                "submodule; name one that it calls"
            )


def submodule(module: nn.Module, name: str) -> nn.Module:
    """Return the submodule of a name, or refuse with the nearest one.

    Raises:
        ValueError: if there is none.
    """
    modules = dict(module.named_modules())
    if name not in modules:
        options = [n for n in modules if n]
        hint = checks.nearest(name, options)
        shown = hint or f": it has {', '.join(map(repr, options[:8])) or 'no submodules'}"
        raise ValueError(
            f"`activation({name!r})` names no submodule of the {type(module).__name__}{shown}"
        )
    return modules[name]


def _catch(name: str, caught: dict[str, Tensor], module: nn.Module, _: Any, output: Any) -> Tensor:
    if name in caught:
        raise ValueError(
            f"`activation({name!r})` is ambiguous: the forward calls that submodule several "
            "times; name one that it calls once"
        )
    if not isinstance(output, Tensor) or not output.is_floating_point():
        given = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TypeError(
            f"`activation({name!r})` must be a floating-point tensor; the {type(module).__name__} "
            f"gives {given}: name a submodule within it"
        )
    caught[name] = output if output.requires_grad else output.detach().requires_grad_()
    return caught[name].clone()


@contextmanager
def classifier_inputs(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the last linear layer of a net is given, at every forward.

    Args:
        net: a module; its last ``nn.Linear`` is taken to be the classifier.

    Yields:
        The list that grows: ``[B, d]`` for each forward.

    Raises:
        ValueError: if the net has no linear layer.
    """
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            "the classifier is the net's last nn.Linear; it has none: give the penalty "
            "(logits, features) yourself"
        )
    found: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        hook.remove()


def features(net: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
    """Return what a net gives, and what its last linear layer was given to give it.

    Args:
        net: a module whose output is that of its last ``nn.Linear``.
        x: its input.

    Returns:
        Logits ``[B, C]`` and features ``[B, d]``.

    Raises:
        ValueError: if the net has no linear layer, or it did not run exactly once.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [tuple(t.shape) for t in features(net, torch.ones(5, 3))]
    [(5, 2), (5, 4)]
    """
    with classifier_inputs(net) as found:
        logits = net(x)
    if len(found) != 1:
        raise ValueError(f"the net's last nn.Linear must run once in a forward; ran {len(found)}")
    return logits, found[0]
