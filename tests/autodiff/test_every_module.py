"""Every kind of module in torch.nn inside of a critic: as double backprop by hand, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkit

V, S, L, P, D = (5, 6), (5, 4, 6), (5, 4, 8), (5, 4, 8, 8), (5, 4, 4, 4, 4)


class Of(nn.Module):
    """A function of x, with modules of its own."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.own = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.own)


def layer(**options):
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **{"dropout": 0.0, **options})


MODULES = {
    "Linear": (lambda: nn.Linear(6, 3), V),
    "Bilinear": (lambda: Of(lambda x, b: b(x, x), nn.Bilinear(6, 6, 2)), V),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3), L),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1), P),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), P),
    "Conv2d, reflect": (lambda: nn.Conv2d(4, 3, 3, padding=2, padding_mode="reflect"), P),
    "Conv3d": (lambda: nn.Conv3d(4, 2, 2), D),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), L),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), P),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 2, 2), D),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), P),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), D),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), P),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), P),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(3), P),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), D),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d(2), P),
    "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), D),
    "CircularPad2d": (lambda: nn.CircularPad2d(2), P),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), V),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), P),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), P),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), P),
    "LayerNorm": (lambda: nn.LayerNorm(6), S),
    "RMSNorm": (lambda: nn.RMSNorm(6), S),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), P),
    "RNN": (lambda: nn.RNN(6, 3, batch_first=True), S),
    "LSTM": (lambda: nn.LSTM(6, 3, batch_first=True), S),
    "GRU": (lambda: nn.GRU(6, 3, batch_first=True, bidirectional=True), S),
    "LSTMCell": (lambda: nn.LSTMCell(6, 3), V),
    "GRUCell": (lambda: nn.GRUCell(6, 3), V),
    "MultiheadAttention": (
        lambda: Of(lambda x, a: a(x, x, x)[0], nn.MultiheadAttention(6, 2, batch_first=True)),
        S,
    ),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(layer(), 2), S),
    "TransformerDecoderLayer": (
        lambda: Of(
            lambda x, t: t(x, x),
            nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        ),
        S,
    ),
    "Transformer": (
        lambda: Of(
            lambda x, t: t(x, x), nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, batch_first=True)
        ),
        S,
    ),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), P),
    "Upsample, bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), P),
    "Upsample, bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), P),
    "Unfold and Fold": (lambda: nn.Sequential(nn.Unfold(2), nn.Fold((8, 8), 2)), P),
    "CosineSimilarity": (lambda: Of(lambda x: F.cosine_similarity(x, x.flip(1) + 1)), V),
    "PairwiseDistance": (lambda: Of(lambda x: F.pairwise_distance(x, x.flip(1) + 1)), V),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: Of(lambda x, a: a.log_prob(x), nn.AdaptiveLogSoftmaxWithLoss(6, 10, [4, 8], 2)),
        V,
    ),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 3)), V),
    "grid_sample": (
        lambda: Of(
            lambda x: F.grid_sample(x, 0.9 * x[:, :2].movedim(1, 3).tanh(), align_corners=False)
        ),
        P,
    ),
    "einsum": (lambda: Of(lambda x: torch.einsum("bij,bkj->bik", x, x)), S),
    "fft": (lambda: Of(lambda x: torch.fft.rfft(x).abs()), S),
    "svdvals": (lambda: Of(torch.linalg.svdvals), S),
    "cumprod": (lambda: Of(lambda x: x.cumsum(1).cumprod(1)), V),
    "topk": (lambda: Of(lambda x: x.topk(2).values), V),
}


class Critic(nn.Module):
    """A linear layer, the module, and a score for each sample."""

    def __init__(self, part, shape):
        super().__init__()
        self.first, self.part = nn.Linear(shape[-1], shape[-1]), part
        with torch.no_grad():
            self.last = nn.Linear(self.features(torch.zeros(shape)).shape[1], 1)

    def features(self, x):
        h = self.part(self.first(x))
        while isinstance(h, tuple):  # outputs and states
            h = h[0]
        return h.reshape(len(x), -1)

    def forward(self, x):
        return self.last(self.features(x).tanh())


def by_hand(critic, x, kind):
    """Return R1 of weight 2, or ‖∇L‖², with double backprop, on the kernels that have one."""
    with sdpa_kernel(SDPBackend.MATH):
        z = x.clone().requires_grad_()
        y = critic(z)
    if kind == "r1":
        (g,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        return g.flatten(1).square().sum(1).mean()
    found = torch.autograd.grad(
        y.square().mean(), list(critic.parameters()), create_graph=True, allow_unused=True
    )
    return sum(g.square().sum() for g in found if g is not None)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:.*nested_tensor")
@pytest.mark.parametrize("kind", ["r1", "weight"])
@pytest.mark.parametrize("name", MODULES)
def test_a_penalty_is_double_backprop_by_hand(name, kind):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    critic = Critic(make(), shape).double()
    x = torch.randn(shape, dtype=torch.float64)
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    if kind == "r1":
        value = gpkit.r1(weight=2.0)(critic, real=x)
    else:
        value = gpkit.weight_grad_norm(weight=1.0)(lambda: critic(x).square().mean(), critic)
    for key, tensor in critic.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    parameters = list(critic.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    true = by_hand(critic, x, kind)
    wanted = torch.autograd.grad(true, parameters, allow_unused=True)
    torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-14)
    for g, w in zip(found, wanted, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        g, w = (zero if t is None else t for t in (g, w))
        g, w = torch.broadcast_tensors(g, w)
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-10)
