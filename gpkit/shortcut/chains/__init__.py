"""Gradients through a chain of linear layers and elementwise functions, written out by hand."""

from gpkit.shortcut.chains.inputs import InputChain
from gpkit.shortcut.chains.losses import LossChain, LossPass

__all__ = ["InputChain", "LossChain", "LossPass"]
