"""Watching a LightningModule while it trains, without changing it.

``wrapping`` wraps a method of a module, ``probe`` reads inputs, outputs and activations by hooks,
and ``replay`` runs a training step again without side effects.
"""
