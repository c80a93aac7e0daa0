"""Small nets of many kinds. Each has a twin of the same parameters, in elementary operations.

The twin is what the oracle differentiates: torch's fused norm layers have a wrong third derivative,
and `torch.func` has no rule for some layers. Every net has parts named ``body``, ``act`` and
``head``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrizations

from tests.property.modules import (
    Attention,
    Buffered,
    Checkpointed,
    Cubic,
    Direction,
    Kinked,
    Named,
    Pairs,
    Parts,
    Recurrent,
    Scaled,
    Spread,
    Standardised,
    Tied,
    Tokens,
    Twice,
    TwoInputs,
    Unused,
    Waves,
)


@dataclass(frozen=True)
class Kind:
    """How a net is built, and what it takes."""

    build: Callable[[int, bool], nn.Module]  # number of outputs, elementary
    shapes: tuple[tuple[int, ...], ...] = ((3,),)
    smooth: bool = True
    coupled: bool = False  # samples of a batch see each other in training mode
    chained: bool = False  # the act is given the output of the body
    degree: int = 99  # the order above which derivatives in the inputs vanish


def mlp(act: Callable[[], nn.Module], middle: Callable[[bool], nn.Module] | None = None):
    def build(outputs: int, elementary: bool) -> nn.Module:
        body: nn.Module = nn.Linear(3, 3)
        if middle is not None:
            body = nn.Sequential(body, middle(elementary))
        return Parts(body, act(), nn.Linear(3, outputs))

    return build


def conv(act: Callable[[], nn.Module], *more: nn.Module, inputs: int = 8):
    def build(outputs: int, elementary: bool) -> nn.Module:
        return Parts(
            nn.Conv2d(2, 2, (1, 2), bias=False),
            nn.Sequential(act(), *more),
            nn.Linear(inputs, outputs),
        )

    return build


def normed(layer: Callable[[], nn.Module], **how) -> Callable[[bool], nn.Module]:
    return lambda elementary: Standardised(layer(), **how) if elementary else layer()


def frozen(outputs: int, elementary: bool) -> nn.Module:
    net = mlp(nn.SiLU)(outputs, elementary)
    net.body.requires_grad_(False)
    return net


def zero(outputs: int, elementary: bool) -> nn.Module:
    net = mlp(nn.Tanh)(outputs, elementary)
    nn.init.zeros_(net.head.weight)
    return net


def weight_normed(outputs: int, elementary: bool) -> nn.Module:
    body = Direction() if elementary else parametrizations.weight_norm(nn.Linear(3, 3))
    return Parts(body, nn.Tanh(), nn.Linear(3, outputs))


def dropping(outputs: int, elementary: bool) -> nn.Module:
    net = mlp(nn.Tanh, lambda _: nn.Dropout(0.4))(outputs, elementary)
    return net.eval()


def grouped(outputs: int, elementary: bool) -> nn.Module:
    layer = nn.GroupNorm(2, 2)
    body = nn.Conv2d(2, 2, (1, 2), bias=False)
    norm = Standardised(layer, groups=2) if elementary else layer
    return Parts(nn.Sequential(body, norm), nn.Tanh(), nn.Linear(8, outputs))


IMAGE = ((2, 2, 3),)
SERIES = ((3, 2),)

KINDS: dict[str, Kind] = {
    "tanh": Kind(chained=True, build=mlp(nn.Tanh)),
    "softplus": Kind(chained=True, build=mlp(nn.Softplus)),
    "gelu": Kind(chained=True, build=mlp(nn.GELU)),
    "silu": Kind(chained=True, build=mlp(nn.SiLU)),
    "mish": Kind(mlp(nn.Mish)),
    "softmax": Kind(mlp(lambda: nn.Softmax(1))),
    "relu": Kind(mlp(lambda: nn.ReLU(inplace=True)), smooth=False, degree=1),
    "kinked": Kind(mlp(Kinked), smooth=False, degree=2),
    "cubic": Kind(mlp(Cubic), degree=3),
    "linear": Kind(mlp(nn.Identity), degree=1),
    "conv": Kind(conv(nn.Tanh), IMAGE, chained=True),
    "conv_pool": Kind(conv(nn.Softplus, nn.MaxPool2d(2), inputs=2), IMAGE, smooth=False),
    "group_norm": Kind(grouped, IMAGE),
    "layer_norm": Kind(mlp(nn.Tanh, normed(lambda: nn.LayerNorm(3)))),
    "batch_norm": Kind(mlp(nn.Tanh, normed(lambda: nn.BatchNorm1d(3), batch=True)), coupled=True),
    "dropout": Kind(dropping),
    "buffer": Kind(lambda m, e: Buffered(m)),
    "scalars": Kind(lambda m, e: Parts(Scaled(), nn.Sigmoid(), nn.Linear(3, m))),
    "tied": Kind(lambda m, e: Tied(m)),
    "twice": Kind(lambda m, e: Twice(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, m))),
    "waves": Kind(lambda m, e: Parts(Waves(), nn.Tanh(), nn.Linear(3, m))),
    "unused": Kind(lambda m, e: Unused(m)),
    "frozen": Kind(frozen),
    "zero": Kind(zero),
    "weight_norm": Kind(weight_normed),
    "checkpoint": Kind(
        lambda m, e: (Parts if e else Checkpointed)(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, m))
    ),
    "two_inputs": Kind(lambda m, e: TwoInputs(m), ((3,), (1, 2, 3))),
    "pairs": Kind(lambda m, e: Pairs(m), ((1, 2, 2), (2, 2, 2))),
    "attention": Kind(lambda m, e: Attention(m, e), SERIES),
    "gru": Kind(lambda m, e: Parts(Recurrent(e), nn.Identity(), nn.Linear(2, m)), SERIES),
    "series": Kind(lambda m, e: Parts(nn.Linear(2, 2), nn.Tanh(), nn.Linear(6, m)), SERIES),
    "maps": Kind(lambda m, e: Parts(nn.Linear(3, 3), nn.Tanh(), Spread(3, m))),
    "dict": Kind(lambda m, e: Named(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, m))),
    "tokens": Kind(lambda m, e: Tokens(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, m)), ((4,),)),
}
