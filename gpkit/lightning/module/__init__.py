"""`PenalizedModule`: any net, trained on a loss and penalties.

``module`` is the LightningModule, ``forward`` a forward pass and what penalties take of it,
``compiled`` the penalised loss as one compiled graph, ``losses`` a loss for each sample, and
``metrics`` those that a loss brings.
"""

from gpkit.lightning.module.module import PenalizedModule as PenalizedModule
