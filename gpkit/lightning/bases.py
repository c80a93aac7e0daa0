"""The callback class of Lightning, under both of its names."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
else:
    # `lightning.pytorch` is the same library as `pytorch_lightning`, with classes of its own, and
    # its trainer takes callbacks of its own class. Where both are installed we are of both.
    _names = ["pytorch_lightning", *["lightning.pytorch"] * (find_spec("lightning") is not None)]
    Callback = type("Callback", tuple(import_module(name).Callback for name in _names), {})


def is_a(thing: Any, *names: str) -> bool:
    """Whether a class of one of these names is among those of ``thing``, of either package."""
    return any(c.__name__ in names for c in type(thing).__mro__)
