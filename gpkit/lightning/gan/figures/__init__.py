"""Figures of a GAN in training.

``callback`` holds `GANFigures`, ``drawings`` the figures, ``coverage`` counts the modes that a
generator covers, and ``dirac`` holds `DiracPath`.
"""

from gpkit.lightning.gan.figures.callback import GANFigures as GANFigures
from gpkit.lightning.gan.figures.dirac import DiracPath as DiracPath
