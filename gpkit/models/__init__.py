"""Small nets for the application.

A net of a task is `Net(input_shape, num_outputs, *, own options)`, a critic
`Critic(input_shape, *, own options)` and a generator
`Generator(latent_dim, output_shape, *, own options)`.
"""

from gpkit.models.convnet import ConvNet
from gpkit.models.critics import ImageCritic, PointCritic
from gpkit.models.dirac import DiracCritic, DiracGenerator
from gpkit.models.generators import ImageGenerator, PointGenerator
from gpkit.models.mlp import MLP
from gpkit.models.vit import ViT

__all__ = [
    "MLP",
    "ConvNet",
    "DiracCritic",
    "DiracGenerator",
    "ImageCritic",
    "ImageGenerator",
    "PointCritic",
    "PointGenerator",
    "ViT",
]
