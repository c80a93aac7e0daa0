"""`PenalizedModule`: trains any net on a loss and gradient penalties.

``module`` holds the LightningModule, ``forward`` its forward pass and what each penalty takes from
it, ``compiled`` the loss and its penalties as one compiled graph, ``losses`` the loss of each
sample, and ``metrics`` the default metrics of a loss.
"""

from gpkit.lightning.module.module import PenalizedModule as PenalizedModule
