"""Figures of a GAN in training, and what studies of critics log.

``callback`` holds `GANFigures`, ``drawings`` the figures, ``coverage`` counts the modes that a
generator covers, ``dirac`` holds `DiracPath`, and ``layers`` `CriticLayers`.
"""

from gpkit.lightning.gan.figures.callback import GANFigures as GANFigures
from gpkit.lightning.gan.figures.dirac import DiracPath as DiracPath
from gpkit.lightning.gan.figures.layers import CriticLayers as CriticLayers
