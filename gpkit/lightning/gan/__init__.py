"""`GANModule`: trains a critic and a generator with gradient penalties.

``module`` holds the LightningModule, ``training`` one training step, ``objectives`` what each net
is trained on, ``scores`` the critic's scores, ``latents`` the generator's penalties in z or w,
``losses`` the GAN losses by name, ``slopes`` the slopes of the critic and its optimality,
``logging`` the logged scalars, ``stepping`` optimiser steps, ``support`` what a fit
needs, ``ema`` the average of the generator, ``samples`` what makes and takes samples, ``checks``
the checks of arguments, and ``figures`` the callbacks that draw.
"""

from gpkit.lightning.gan.module import GANModule as GANModule
