"""Small nets for the application: each is `Net(input_shape, num_outputs, *, own options)`."""

from gpkit.models.convnet import ConvNet
from gpkit.models.mlp import MLP
from gpkit.models.vit import ViT

__all__ = ["MLP", "ConvNet", "ViT"]
