"""The nets that a penalty has been found to train: each is looked at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from gpkit.estimators.base import Target

MANY = 64


class SeenNets:
    """The nets that a penalty has been found to train, told apart by their graphs.

    A net is known by the kinds of operations in its graph, and by its parameters. So another net,
    other layers, and a parameter that was frozen or released since count as new. So does a net
    that was looked at for another derivative, as of a penalty whose order was changed since.
    """

    def __init__(self) -> None:
        self.found: dict[Any, dict[int, weakref.ref[Tensor]]] = {}
        self.taken: tuple[Any, ...] = ()  # what the derivative is, see `by`

    def __bool__(self) -> bool:
        return bool(self.found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeenNets) and self.found.keys() == other.found.keys()

    __hash__ = None  # type: ignore[assignment]

    def by(self, axes: Any) -> SeenNets:
        """Return it, to ask for nets with the derivative that a penalty takes now."""
        self.taken = axes.order, type(axes.wrt), type(axes.estimator), type(axes.form)
        return self

    def __contains__(self, target: Target) -> bool:
        key, leaves, _ = target.fingerprint
        found = self.found.get((self.taken, key))
        return found is not None and all(found[id(leaf)]() is leaf for leaf in leaves)

    def add(self, target: Target) -> None:
        """Remember the net of a target."""
        if len(self.found) >= MANY:  # such as parameters that are made anew at every step
            self.found.clear()
        key, leaves, _ = target.fingerprint
        self.found[self.taken, key] = {id(leaf): weakref.ref(leaf) for leaf in leaves}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as empty: the nets of a copy are other nets."""
        return SeenNets, ()


class Unchecked(SeenNets):
    """Takes every net for one that has been looked at: no check, and no cost of one."""

    def __bool__(self) -> bool:
        return True

    def __contains__(self, target: Target) -> bool:
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as it is."""
        return Unchecked, ()
