"""Where an operation is: the module of a net that made a node which cannot be differentiated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from gpkit.autodiff import graph
from gpkit.autodiff.compat import is_compiled, operation_of
from gpkit.finding import Finding, FoundError
from gpkit.findings.compat import made_at
from gpkit.findings.derivatives import (
    PIECEWISE_LINEAR,
    derivative_findings,
    not_finite_derivative,
    undifferentiable,
)
from gpkit.findings.watch import Watch


def named(
    nodes: Iterable[Any], known: dict[Any, Finding], watch: Watch
) -> Iterator[tuple[str, Finding]]:
    """Yield operations that cannot be differentiated twice: the name of the module, and why.

    Args:
        nodes: of the graph.
        known: what is known of some of them.
        watch: has seen the forward pass.

    Yields:
        Each pair once, by name.
    """
    pairs = {
        (watch.name_of(node), found)
        for node in nodes
        if (found := known.get(node) or undifferentiable(node)) is not None
    }
    yield from sorted(pairs, key=str)


def piecewise_linear(nodes: Iterable[Any], watch: Watch) -> list[str]:
    """Return the modules that made operations without a second derivative but zero."""
    kinds = set(PIECEWISE_LINEAR)
    found = sorted((n for n in nodes if operation_of(n) in kinds), key=made_at)
    return list(dict.fromkeys(map(watch.name_of, found)))


def not_finite(nodes: Iterable[Any], watch: Watch, order: int) -> Iterator[tuple[str, Finding]]:
    """Yield the first operation with a derivative that is not finite: its module, and why."""
    for node in sorted(nodes, key=made_at):
        found = not_finite_derivative(node, order)
        if found is not None:
            yield watch.name_of(node), found
            return  # what comes after it may get it from here


def located(failure: FoundError, watch: Watch) -> FoundError:
    """Return the error of a penalty with the names of the modules that it comes from.

    Args:
        failure: the error.
        watch: has seen the forward pass.

    Returns:
        The same error if they are not known.
    """
    code = failure.finding.code
    nodes = list(dict.fromkeys(node for y in watch.outputs for node in graph.nodes(y)))
    if code == "piecewise-linear":
        names = piecewise_linear(nodes, watch)
    elif code == "not-finite":
        names = [name for name, _ in not_finite(nodes, watch, 3)]
    else:
        pairs = [
            pair
            for y in watch.outputs
            for pair in derivative_findings(y, tuple(graph.leaves(y)), 2)
        ]
        found = named(nodes, dict(pairs), watch)
        names = list(dict.fromkeys(name for name, own in found if own.code == code))
    if not names:
        return failure
    listed = ", ".join(repr(name) for name in names[:4])
    where = f"{listed} and {len(names) - 4} more" if len(names) > 4 else listed
    return FoundError(replace(failure.finding, module=where), f"{failure} (in the net: {where})")


def first_watch(net: nn.Module) -> AbstractContextManager[Watch | None]:
    """Return a context that notes which module makes which node, for the first step of a penalty.

    Of a net with a compiled module it notes nothing: a hook would compile that again.
    """
    if any(map(is_compiled, net.modules())):
        return nullcontext()
    return Watch(net, values=False)


@contextmanager
def locating(net: nn.Module) -> Iterator[None]:
    """A context that adds the names of a net's modules to an error of a penalty.

    Raises:
        FoundError: the error of the penalty.
    """
    with first_watch(net) as watch:
        try:
            yield
        except FoundError as failure:
            found = failure if watch is None else located(failure, watch)
            if found is failure:
                raise
            raise found from failure
