"""Observe and rerun the training step of a LightningModule without changing the module.

``wrapping`` wraps a method of a module, ``probe`` captures inputs, outputs and activations by
forward hooks, and ``replay`` reruns a training step without side effects on logs and metrics.
"""
