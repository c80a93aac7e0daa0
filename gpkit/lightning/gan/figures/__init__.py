"""Figures of a GAN in training: a callback, what it draws, and how many modes are covered."""

from gpkit.lightning.gan.figures.callback import GANFigures as GANFigures
from gpkit.lightning.gan.figures.dirac import DiracPath as DiracPath
