"""Critics and generators: the module that trains them, what it measures, and its figures."""

from gpkit.lightning.gan.module import GANModule

__all__ = ["GANModule"]
