"""Nets for doctor.py: of other libraries, unchanged, of public GANs, written anew, and gpkit's own.

All are small, with random weights. A library that is not installed is left out, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from gpkit.models import MLP, ConvNet, ImageCritic, ViT

B, CLASSES = 4, 3


@dataclass
class Case:
    """A net and a batch.

    Args:
        net: the net.
        inputs: what it takes: a tensor, a tuple, or a dict by keyword.
        y: labels ``[B]``; None for a critic, which gives scores.
        field: of the output, where it is no tensor and has no logits.
    """

    net: nn.Module
    inputs: Any
    y: Tensor | None = None
    field: str = ""

    @property
    def example(self) -> Any:
        """The batch, as `gpkit.diagnose` takes it."""
        if self.y is None:
            return self.inputs
        if isinstance(self.inputs, dict):
            return {**self.inputs, "labels": self.y}
        return (self.inputs, self.y)

    @property
    def x(self) -> Tensor:
        """The first floating-point input, or the first."""
        found = self.inputs
        found = list(found.values()) if isinstance(found, dict) else found
        found = list(found) if isinstance(found, (list, tuple)) else [found]
        return next((t for t in found if t.is_floating_point()), found[0])

    def run(self, net: nn.Module, z: Tensor | None = None) -> Tensor:
        """Return the output of a net as one tensor, at the points ``z``."""
        x = self.x

        def put(value: Any) -> Any:
            return z if z is not None and value is x else value

        if isinstance(self.inputs, dict):
            output = net(**{key: put(value) for key, value in self.inputs.items()})
        elif isinstance(self.inputs, tuple):
            output = net(*map(put, self.inputs))
        else:
            output = net(put(self.inputs))
        return getattr(output, self.field or "logits", output)


# of other libraries


def timm(name: str, **options: Any) -> Case:
    """An image classifier of timm."""
    net = importlib.import_module("timm").create_model(name, num_classes=CLASSES, **options)
    size = options.get("img_size", 32)
    return images(net, size)


def swin() -> Case:
    """A small Swin transformer of timm."""
    module = importlib.import_module("timm.models.swin_transformer")
    made = module.SwinTransformer(
        img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2),
        num_classes=CLASSES, drop_path_rate=0.0,
    )  # fmt: skip
    return images(made, 16)


def images(net: nn.Module, size: int, y: bool = True, channels: int = 3) -> Case:
    """A net with images."""
    x = torch.randn(B, channels, size, size)
    return Case(net, x, torch.arange(B) % CLASSES if y else None)


def gpt2(implementation: str = "sdpa") -> Case:
    """GPT-2 for the classification of texts."""
    library = importlib.import_module("transformers")
    config = library.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2, num_labels=CLASSES,
        pad_token_id=0, attn_implementation=implementation,
    )  # fmt: skip
    net = library.GPT2ForSequenceClassification(config)
    return Case(net, {"input_ids": torch.randint(1, 20, (B, 6))}, torch.arange(B) % CLASSES)


def bert(embedded: bool) -> Case:
    """BERT for the classification of texts, given as tokens or as embeddings."""
    library = importlib.import_module("transformers")
    config = library.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, num_labels=CLASSES,
    )  # fmt: skip
    net = library.BertForSequenceClassification(config)
    inputs = {"inputs_embeds": torch.randn(B, 6, 16)}
    if not embedded:
        inputs = {"input_ids": torch.randint(1, 20, (B, 6))}
    return Case(net, inputs, torch.arange(B) % CLASSES)


def unet() -> Case:
    """A UNet of diffusers, as a critic of noised images: a score for each pixel."""
    net = importlib.import_module("diffusers").UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    inputs = {"sample": torch.randn(B, 1, 4, 4), "timestep": torch.tensor([0, 3, 5, 9])}
    return Case(net, inputs, field="sample")


class Graphs(nn.Module):
    """Two layers of torch_geometric's graph convolution: classes of nodes."""

    def __init__(self) -> None:
        super().__init__()
        layers = importlib.import_module("torch_geometric.nn")
        self.one, self.two = layers.GCNConv(5, 8), layers.GCNConv(8, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return the logits of each node."""
        return self.two(self.one(x, edges).relu(), edges)


def gcn() -> Case:
    """A graph of eight nodes in a ring."""
    ring = torch.stack([torch.arange(8), torch.arange(8).roll(-1)])
    return Case(Graphs(), (torch.randn(8, 5), ring), torch.arange(8) % CLASSES)


class Sequences(nn.Module):
    """A layer of torch over a sequence, and a linear layer on its last or mean output."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each sequence."""
        out = self.layer(x)
        return self.head(out[0][:, -1] if isinstance(out, tuple) else out.mean(1))


def sequences(layer: nn.Module) -> Case:
    """Sequences of six vectors of eight numbers."""
    return Case(Sequences(layer, 8), torch.randn(B, 6, 8), torch.arange(B) % CLASSES)


def transformer() -> Case:
    """An encoder of torch, with its default dropout."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return sequences(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


# discriminators of public GANs, written anew


def dcgan() -> Case:
    """DCGAN's discriminator, with batch norm."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 4, bias=False), nn.Flatten(),
    )  # fmt: skip
    return images(net, 16, y=False)


class Down(nn.Module):
    """A residual block of SNGAN's discriminator."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.two = spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return half as large an image."""
        h = self.two(self.one(x.relu()).relu())
        return nn.functional.avg_pool2d(h + self.skip(x), 2)


def sngan() -> Case:
    """SNGAN's residual discriminator, with spectral norm."""
    net = nn.Sequential(
        Down(3, 8), Down(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        spectral_norm(nn.Linear(8, 1)),
    )  # fmt: skip
    return images(net, 16, y=False)


def patchgan() -> Case:
    """pix2pix's discriminator, with instance norm: a score for each patch."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.InstanceNorm2d(16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 4, 1, 1),
    )  # fmt: skip
    return images(net, 16, y=False)


class Deviation(nn.Module):
    """StyleGAN2's minibatch standard deviation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with one channel more."""
        spread = (x.var(0, correction=0) + 1e-8).sqrt().mean()
        return torch.cat([x, spread.expand(len(x), 1, *x.shape[2:])], 1)


def stylegan2() -> Case:
    """A discriminator as StyleGAN2's: residual blocks, leaky ReLU, minibatch deviation."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.2),
        nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2),
        Deviation(), nn.Conv2d(17, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(256, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1),
    )  # fmt: skip
    return images(net, 16, y=False)


# nets that cannot take every penalty


class Distances(nn.Module):
    """Distances to prototypes, by torch.cdist."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 8))
        self.first = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return -torch.cdist(self.first(x).tanh(), self.prototypes)


class Reentrant(nn.Module):
    """A net with a part that is checkpointed in the old way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(checkpoint(self.part, self.first(x), use_reentrant=True))


def vectors(net: nn.Module, outputs: int = CLASSES) -> Case:
    """A net of vectors of six numbers."""
    return Case(net, torch.randn(B, 6), torch.arange(B) % CLASSES if outputs > 1 else None)


def normed(norm: nn.Module) -> Case:
    """A smooth net with a norm layer; torch's third derivative of two of the three is wrong."""
    return vectors(nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES)))


def hard() -> nn.Module:
    """A net with hardsigmoid, as in MobileNetV3's squeeze and excitation."""
    return nn.Sequential(nn.Linear(6, 8), nn.Hardsigmoid(), nn.Linear(8, CLASSES))


CASES: dict[str, Callable[[], Case]] = {
    "timm test_resnet": lambda: timm("test_resnet"),
    "timm test_vit": lambda: timm("test_vit", img_size=32),
    "timm test_convnext": lambda: timm("test_convnext"),
    "timm test_efficientnet": lambda: timm("test_efficientnet"),
    "timm SwinTransformer": swin,
    "transformers GPT-2": gpt2,
    "transformers BERT, tokens": lambda: bert(embedded=False),
    "transformers BERT, embeddings": lambda: bert(embedded=True),
    "diffusers UNet2DModel": unet,
    "torch TransformerEncoder": transformer,
    "torch LSTM": lambda: sequences(nn.LSTM(8, 8, batch_first=True)),
    "torch GRU": lambda: sequences(nn.GRU(8, 8, batch_first=True)),
    "torch_geometric GCN": gcn,
    "DCGAN": dcgan,
    "SNGAN": sngan,
    "PatchGAN": patchgan,
    "StyleGAN2": stylegan2,
    "gpkit MLP": lambda: vectors(MLP((6,), CLASSES, width=8)),
    "gpkit ConvNet": lambda: images(ConvNet((1, 8, 8), CLASSES, width=4, groups=2), 8, channels=1),
    "gpkit ViT": lambda: images(ViT((1, 8, 8), CLASSES, dim=8, heads=2, depth=1), 8, channels=1),
    "gpkit ImageCritic": lambda: images(ImageCritic((1, 8, 8), width=4), 8, y=False, channels=1),
    "ReLU critic": lambda: vectors(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), 1),
    "LayerNorm": lambda: normed(nn.LayerNorm(8)),
    "BatchNorm": lambda: normed(nn.BatchNorm1d(8)),
    "GroupNorm": lambda: normed(nn.GroupNorm(2, 8)),
    "Hardsigmoid": lambda: vectors(hard()),
    "cdist": lambda: vectors(Distances()),
    "reentrant checkpoint": lambda: vectors(Reentrant()),
}
