"""`GradientPenaltyCallback`: penalties for a LightningModule that knows nothing of them.

``callback`` is put into the trainer, ``step`` stands in for ``training_step`` and adds the
penalties to its loss, ``findings`` tells before the first step what keeps a penalty from acting,
``sharded`` takes penalties of weights that FSDP2 has sharded.
"""

from gpkit.lightning.callback.callback import GradientPenaltyCallback as GradientPenaltyCallback
