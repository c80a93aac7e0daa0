"""Outputs of submodules, captured by name during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.taylor.jets import is_jet
from gpkit.autodiff.tracing.hooks import hooked
from gpkit.autodiff.tracing.points import variable


@dataclass(frozen=True)
class Named:
    """The output of a submodule, named as in ``module.named_modules()``.

    Args:
        name: such as "encoder.3".

    Raises:
        ValueError: if the name is not a string, or is empty.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(
                f"`activation(name=...)` must be the name of a submodule, such as 'encoder.3'; "
                f"got {self.name!r}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The name, alone."""
        return (self.name,)


def names(*axes: Any) -> list[str]:
    """Return the names of the activations among ``axes``, without duplicates."""
    return list(dict.fromkeys(name for axis in axes for name in getattr(axis, "names", ())))


Change = Callable[[Tensor], Tensor]  # of the output of a submodule


def moved(
    names: Sequence[str], xs: Sequence[Tensor], before: Sequence[Tensor]
) -> dict[str, Change]:
    """Return how outputs of submodules become other ones.

    Args:
        names: of the submodules.
        xs: the outputs now.
        before: the outputs before. One output is replaced; the moves of several are added, because
            one may be computed from another that is moved.
    """
    if len(names) == 1:
        return {names[0]: lambda output: xs[0]}
    triples = zip(names, xs, before, strict=True)
    return {name: partial(_add, x, h) for name, x, h in triples}


def _add(x: Tensor, before: Tensor, output: Tensor) -> Tensor:
    return output + (x - before)


def module_of(name: str, f: Any, args: Iterable[Any]) -> nn.Module:
    """Return the module with the activation: one in ``args``, or ``f``, or one that ``f`` wraps.

    Raises:
        TypeError: if there is none.
    """
    parts = f.args if isinstance(f, partial) else ()
    for owner in (*args, f, getattr(f, "__self__", None), *parts):
        if isinstance(owner, nn.Module):
            return owner
    raise TypeError(
        f"`activation({name!r})` needs the module that contains it: penalty(net, x), or "
        f"penalty(f, x, net) for a function f that calls the net; got only a {type(f).__name__}"
    )


@contextmanager
def captured(
    module: nn.Module | None, wanted: Iterable[str], changes: Mapping[str, Change] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of submodules during one forward pass; the hooks are removed after it.

    The net continues with a copy of the output, so that an in-place operation does not change the
    captured tensor. An output without a graph is captured as a leaf that requires grad.

    Args:
        module: the net; None if ``wanted`` is empty.
        wanted: names, as in ``module.named_modules()``.
        changes: of outputs, by name, see `moved`.

    Yields:
        The outputs by name: complete when the block ends.

    Raises:
        ValueError: if there is no such submodule, or it does not run exactly once.
        TypeError: if its output is not a floating-point tensor.
    """
    caught: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in wanted:
            assert module is not None
            hook = partial(_catch, name, caught, (changes or {}).get(name))
            stack.callback(hooked(submodule(module, name), hook).remove)
        yield caught
    for name in wanted:
        if name not in caught:
            raise ValueError(
                f"`activation({name!r})` was not computed: the forward does not call that "
                "submodule; name one that it calls"
            )


def submodule(module: nn.Module, name: str) -> nn.Module:
    """Return the submodule with a name.

    Raises:
        ValueError: if there is none; the message suggests the closest name.
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


def _catch(
    name: str,
    caught: dict[str, Tensor],
    change: Change | None,
    module: nn.Module,
    _: Any,
    output: Any,
) -> Tensor:
    if name in caught:
        raise ValueError(
            f"`activation({name!r})` is ambiguous: the forward calls that submodule several "
            "times; name one that it calls once"
        )
    if not isinstance(output, Tensor) or not output.is_floating_point():
        given = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TypeError(
            f"`activation({name!r})` must be a floating-point tensor; the {type(module).__name__} "
            f"returns {given}: name a submodule inside it"
        )
    if change is not None:
        caught[name] = change(output)
        return caught[name].clone()
    has_graph = output.requires_grad or is_jet(output)  # a jet has graphs in its coefficients
    caught[name] = output if has_graph else variable(output)
    return caught[name].clone()


@contextmanager
def classifier_inputs(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of the last linear layer of a net, in each forward pass.

    Args:
        net: a module; its last ``nn.Linear`` is taken as the classifier.

    Yields:
        A list to which each forward pass appends ``[B, d]``.

    Raises:
        ValueError: if the net has no linear layer.
    """
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            "the net has no nn.Linear, whose last one would be the classifier: give the penalty "
            "(logits, features) yourself"
        )
    found: list[Tensor] = []
    hook = hooked(linear[-1], lambda _, args, __: found.append(args[0]))
    try:
        yield found
    finally:
        hook.remove()


def features(net: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the output of a net and the input of its last linear layer, in one forward pass.

    Args:
        net: a module that ends with its last ``nn.Linear``.
        *args: its inputs.
        **kwargs: those by name.

    Returns:
        Logits ``[B, C]`` and features ``[B, d]``.

    Raises:
        ValueError: if the net has no ``nn.Linear``, or the last one does not run exactly once.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [tuple(t.shape) for t in features(net, torch.ones(5, 3))]
    [(5, 2), (5, 4)]
    """
    with classifier_inputs(net) as found:
        logits = net(*args, **kwargs)
    if len(found) != 1:
        raise ValueError(f"the net's last nn.Linear must run once; it ran {len(found)} times")
    return logits, found[0]
