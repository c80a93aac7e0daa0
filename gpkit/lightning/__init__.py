"""LightningModules and callbacks that train with gradient penalties and log gradient norms.

- ``module``: `PenalizedModule` trains any net on a loss and penalties.
- ``gan``: `GANModule` trains a critic and a generator.
- ``callback``: `GradientPenaltyCallback` adds penalties to any LightningModule.
- ``monitor``: `GradientNormMonitor` logs gradient norms of any LightningModule.

They share ``watch`` (forward hooks, and reruns of a training step), ``recording`` (scalars and
histograms), ``norms``, ``batches``, ``refusals`` (one error for all findings) and ``compat`` (all
private API of Lightning). A new feature gets its own folder.
"""
