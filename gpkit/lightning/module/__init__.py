"""`PenalizedModule`: trains any net on a loss and gradient penalties.

``module`` holds the LightningModule, ``forward`` its forward pass and what each penalty takes from
it, ``losses`` the loss of each sample, and ``metrics`` the default metrics of a loss.
"""

from gpkit.lightning.module.module import PenalizedModule as PenalizedModule
