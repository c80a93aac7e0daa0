"""Small nets for the application, the examples and the tests.

``mlp``, ``convnet`` and ``vit`` predict classes or values, ``critics`` and ``generators`` make up
GANs, ``dirac`` has the smallest GAN there is, ``distance`` a net that starts as
a distance. ``options`` checks the options that nets share,
``labels`` gives the nets of a GAN their labels.

What belongs here: nets that every penalty can train. They have no batch norm, since it couples the
samples, and a smooth activation by default, since order >= 2 vanishes on a piecewise-linear net.

A net for a task is ``Net(input_shape, num_outputs, *, own options)``, a critic
``Critic(input_shape, *, own options)``, a generator
``Generator(latent_dim, output_shape, *, own options)``. The application calls them so, with what
the data has, and with the options of the config.

To add one:

1. a class in a file of its own, exported below, whose options are keyword arguments with defaults;
2. ``configs/model/<name>.yaml``: the class and the same defaults;
3. a row in ``NETS`` of ``tests/models/test_models.py``, which checks shapes, independent samples
   and curvature;
4. its name in the README's table of groups.

>>> import math, torch
>>> from gpkit.models import options
>>> class Linear(torch.nn.Linear):
...     def __init__(self, input_shape, num_outputs, *, bias=True):
...         options.positive("Linear", num_outputs=num_outputs)
...         super().__init__(math.prod(input_shape), num_outputs, bias)
...
...     def forward(self, x):  # [B, *input_shape] -> [B, num_outputs]
...         return super().forward(x.flatten(1))
>>> Linear((1, 8, 8), 10)(torch.zeros(5, 1, 8, 8)).shape
torch.Size([5, 10])
"""

from gpkit.models.convnet import ConvNet
from gpkit.models.critics import ImageCritic, PointCritic
from gpkit.models.dirac import DiracCritic, DiracGenerator
from gpkit.models.distance import DistanceNet
from gpkit.models.generators import ImageGenerator, PointGenerator
from gpkit.models.mlp import MLP
from gpkit.models.vit import ViT

__all__ = [
    "MLP",
    "ConvNet",
    "DiracCritic",
    "DiracGenerator",
    "DistanceNet",
    "ImageCritic",
    "ImageGenerator",
    "PointCritic",
    "PointGenerator",
    "ViT",
]
