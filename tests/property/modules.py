"""The modules of the nets, and some of them in elementary operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Parts(nn.Module):
    """``head(flatten(act(body(x))))``."""

    def __init__(self, body: nn.Module, act: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.act, self.head = body, act, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)).flatten(1))


class Twice(Parts):
    """The body is applied twice: its weights are shared by two layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.body(x).sin())))


class Tied(Parts):
    """Two layers of the same shape hold one weight."""

    def __init__(self, outputs: int) -> None:
        super().__init__(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs))
        self.second = nn.Linear(3, 3)
        self.second.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.body(x).sin())))


class Unused(Parts):
    """A parameter and a layer that the output does not depend on."""

    def __init__(self, outputs: int) -> None:
        super().__init__(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs))
        self.extra = nn.Parameter(torch.ones(2))
        self.other = nn.Linear(2, 2)


class Buffered(Parts):
    """Inputs are standardised by buffers; one of them is not floating-point."""

    def __init__(self, outputs: int) -> None:
        super().__init__(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs))
        self.register_buffer("mean", torch.tensor([0.5, -1.0, 0.2]))
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean) * self.calls / 2)


class Scaled(nn.Module):
    """A parameter with no dimensions, and one of a shape that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.tensor([[0.3, -0.2, 0.5]]))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift).tanh()


class Waves(nn.Module):
    """A complex parameter: of two waves, and a real function of them."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(self.spectrum.dtype) @ self.spectrum
        return z.square().real.sin() + z.imag


class TwoInputs(nn.Module):
    """A vector and an image."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(3, 3), nn.Conv2d(1, 1, 2)
        self.act, self.head = nn.Tanh(), nn.Linear(3, outputs)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        found = self.other(image).sin().flatten(1).sum(1, keepdim=True)
        return self.head(self.act(self.body(x) * (1 + found)))


class Pairs(nn.Module):
    """Two images of the same size, with other numbers of channels."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.other = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
        self.act, self.head = nn.Softplus(), nn.Linear(8, outputs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.act(self.body(x) * self.other(y)).flatten(1))


class Attention(nn.Module):
    """Self-attention over a sequence ``[B, T, F]``."""

    def __init__(self, outputs: int, elementary: bool) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, outputs)
        self.elementary = elementary

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.elementary:
            scores = h @ h.transpose(1, 2) / h.shape[-1] ** 0.5
            mixed = scores.exp() / scores.exp().sum(-1, keepdim=True) @ h
        else:
            mixed = F.scaled_dot_product_attention(h, h, h)
        return self.head(self.act(mixed).sum(1))


class Recurrent(nn.Module):
    """The last output of a recurrent net over ``[B, T, F]``."""

    def __init__(self, elementary: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 2, batch_first=True)
        self.elementary = elementary

    def forward(self, x: Tensor) -> Tensor:
        if not self.elementary:
            return self.rnn(x)[0][:, -1]
        h = x[:, 0] * 0
        for step in x.unbind(1):
            given = step @ self.rnn.weight_ih_l0.T + self.rnn.bias_ih_l0
            kept = h @ self.rnn.weight_hh_l0.T + self.rnn.bias_hh_l0
            (r, z, n), (hr, hz, hn) = given.chunk(3, 1), kept.chunk(3, 1)
            r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
            h = (1 - z) * torch.tanh(n + r * hn) + z * h
        return h


class Standardised(nn.Module):
    """The norm layers, in elementary operations."""

    def __init__(self, layer: nn.Module, groups: int = 0, batch: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.groups, self.batch = groups, batch
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if batch:
                self.register_buffer(name, getattr(layer, name))

    def forward(self, x: Tensor) -> Tensor:
        if self.batch and not self.training:
            y = (x - self.running_mean) / (self.running_var + 1e-5) ** 0.5
            return y * self.weight + self.bias
        if self.groups:
            y = x.reshape(len(x), self.groups, -1)
            shape = [1, -1, *[1] * (x.ndim - 2)]
            return centred(y, (2,)).reshape(x.shape) * self.weight.reshape(
                shape
            ) + self.bias.reshape(shape)
        return centred(x, (0,) if self.batch else (-1,)) * self.weight + self.bias


def centred(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    away = x - x.mean(dims, keepdim=True)
    return away / (away.square().mean(dims, keepdim=True) + 1e-5) ** 0.5


class Checkpointed(Parts):
    """The body is run again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(checkpoint(self.body, x, use_reentrant=False)))


class Named(Parts):
    """The output is a dict."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"aux": y.detach() * 2, "logits": y}


class Tokens(Parts):
    """Integers ``[B, T]``, embedded."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)).sum(1))


class Kinked(nn.Module):
    """Operations with kinks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0.1, x.square(), x.abs().clamp(max=0.7)) + x.relu() * x


class Cubic(nn.Module):
    """x³ + x², by products."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x * x / 4 + x * x


class Spread(nn.Module):
    """A head whose output is ``[B, m, 2]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).unflatten(1, (-1, 2))


class Direction(nn.Module):
    """A linear layer under weight norm, g·v/‖v‖, in elementary operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        kept = nn.Module()
        kept.original0, kept.original1 = (
            nn.Parameter(torch.ones(3, 1)),
            nn.Parameter(torch.ones(3, 3)),
        )
        self.parametrizations = nn.ModuleDict({"weight": kept})

    def forward(self, x: Tensor) -> Tensor:
        kept = self.parametrizations["weight"]
        g, v = kept.original0, kept.original1
        return x @ (g * v / (v * v).sum(1, keepdim=True) ** 0.5).T + self.bias
