"""`GradientPenaltyCallback`: gradient penalties for any LightningModule.

``callback`` holds the Lightning callback. It wraps ``training_step`` by ``step``, which adds the
penalties to the loss; ``plan`` says what the penalties of a step need, and ``evaluation`` evaluates
them. ``findings`` checks before the first step that each penalty can act. ``sharded`` holds
penalties in weights that FSDP2 has sharded.
"""

from gpkit.lightning.callback.callback import GradientPenaltyCallback as GradientPenaltyCallback
