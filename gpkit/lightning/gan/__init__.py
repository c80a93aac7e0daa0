"""`GANModule`: a critic and a generator, trained against each other with gradient penalties.

``module`` is the LightningModule, ``objectives`` what the two nets are trained on, ``scores`` the
critic's scores and the penalties on them, ``losses`` the losses by name, ``slopes`` what the
critic's slopes tell, ``stepping`` and ``ema`` what happens at an optimiser step, ``checks`` what is
refused, and ``figures`` the callbacks that draw.
"""

from gpkit.lightning.gan.module import GANModule as GANModule
