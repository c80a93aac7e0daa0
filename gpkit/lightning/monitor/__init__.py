"""`GradientNormMonitor`: gradient norms of a LightningModule that knows nothing of them.

``monitor`` is put into the trainer, ``views`` are the inputs and activations that it watches,
``groups`` the names of parameters in a log, ``inference`` takes gradients during validation, and
``findings`` tells what keeps a norm from being logged.
"""

from gpkit.lightning.monitor.monitor import GradientNormMonitor as GradientNormMonitor
