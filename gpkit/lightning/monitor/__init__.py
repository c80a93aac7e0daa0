"""`GradientNormMonitor`: logs gradient norms of any LightningModule.

``monitor`` holds the Lightning callback, ``step_norms`` computes and logs the norms of one step,
``tensors`` captures the inputs and activations, ``groups`` names parameters for the log,
``validation`` runs a validation step with gradients on, and ``findings`` checks before the first
step that every norm can be logged.
"""

from gpkit.lightning.monitor.monitor import GradientNormMonitor as GradientNormMonitor
