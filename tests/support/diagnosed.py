"""For each finding of the doctor a net and a penalty that show it, and a pair that must not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gpkit

B, N = 6, 4


class Each(nn.Module):
    """A hidden layer, a function of it, and a last layer."""

    def __init__(self, function: Any, width: int = 5, given: int = 5, outputs: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(N, width), nn.Linear(given, outputs)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Distances(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.centres, self.mode = nn.Parameter(torch.randn(5, 5)), mode

    def forward(self, h):
        return torch.cdist(h, self.centres, compute_mode=self.mode)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Wrong(torch.autograd.Function):
    """Its second derivative is cut off: the saved cosine is a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor


class Layer(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


class Bags(nn.Module):
    def __init__(self, bag: bool) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(7, 5) if bag else nn.Embedding(7, 5)
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        h = self.table(x)
        return self.last(h if isinstance(self.table, nn.EmbeddingBag) else h.mean(1))


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, 1)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(self.b(self.a(x).tanh()).tanh())


class Parts(nn.Module):
    """Two branches, one of which is run in a way of its own."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(N, 5), nn.Tanh())
        self.other, self.last, self.run = nn.Linear(N, 5), nn.Linear(5, 3), run

    def forward(self, x):
        return self.last((self.run(self.part, x) + self.other(x)).tanh())


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def under(context):
    def run(part, x):
        with context():
            return part(x)

    return run


def constant(context):
    """A factor that was made in a context."""

    def function(h):
        with context():
            factor = torch.ones(5) * 2
        return h.tanh() * factor

    return function


def of_nothing(function):
    """A function of zeros beside the layer."""
    return lambda: Each(Layer(lambda h: function(h * 0) + h.tanh()))


def smooth() -> nn.Module:
    return Each(Layer(torch.tanh))


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(N, 5), *layers, nn.Linear(5, 1))


def frozen(net: nn.Module) -> nn.Module:
    net[0].requires_grad_(False)
    return net


def scaled(net: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(factor)
    return net


def ctc(output, y):  # [B, 5, 3] as steps first
    steps = output.reshape(B, 5, 3).transpose(0, 1).log_softmax(-1)
    lengths = torch.full((B,), 5), torch.full((B,), 2)
    return F.ctc_loss(steps, y, *lengths, reduction="none")


def in_steps(net: nn.Module) -> nn.Module:
    return nn.Sequential(net, nn.Unflatten(1, (5, 3)))


@dataclass
class Case:
    """A net and a penalty with a finding, and a net or penalty without."""

    code: str
    net: Any
    other: Any
    penalty: Any = gpkit.r1
    other_penalty: Any = None
    example: Any = None
    other_example: Any = None
    module: str = ""
    severity: str = "error"
    loss: Any = None
    other_loss: Any = None
    options: dict = field(default_factory=dict)
    other_options: dict = field(default_factory=dict)


def x():
    return torch.randn(B, N)


def classes():
    return torch.randn(B, N), torch.arange(B) % 3


CASES = {
    "hardsigmoid": Case(
        "no-double-backward",
        lambda: sequence(nn.Hardsigmoid()),
        lambda: sequence(nn.Sigmoid()),
        module="1",
    ),
    "cdist": Case(
        "no-double-backward",
        lambda: sequence(Distances("donot_use_mm_for_euclid_dist")),
        lambda: sequence(Distances("use_mm_for_euclid_dist")),
        module="1",
    ),
    "embedding_bag": Case(
        "no-double-backward",
        lambda: Bags(True),
        lambda: Bags(False),
        gpkit.weight_grad_norm,
        example=lambda: torch.randint(7, (B, 3)),
        module="table",
    ),
    "ctc": Case(
        "no-double-backward",
        lambda: nn.Sequential(nn.Linear(N, 15), nn.Tanh()),
        lambda: nn.Sequential(nn.Linear(N, 15), nn.Tanh()),
        gpkit.input_grad_norm,
        lambda: gpkit.input_grad_norm(estimator="finite_difference"),
        example=lambda: (torch.randn(B, N), torch.tensor([[1, 2]] * B)),
        module="(outside of the net, such as the loss)",
        loss=ctc,
    ),
    "once differentiable": Case(
        "once-differentiable",
        lambda: Each(Layer(Once.apply)),
        smooth,
        module="function",
    ),
    "wrong second derivative": Case(
        "wrong-derivative",
        lambda: Each(Layer(Wrong.apply)),
        lambda: Each(Layer(torch.sin)),
    ),
    "stopped gradient": Case(
        "wrong-derivative",
        lambda: Each(Layer(lambda h: h.tanh() * h.detach().sin())),
        lambda: Each(Layer(lambda h: h.tanh() * h.sin())),
        example=lambda: (torch.randn(B, N), torch.randn(B, 1)),
        severity="warning",
    ),
    "reentrant": Case(
        "reentrant-checkpoint",
        lambda: Each(Layer(lambda h: checkpoint(torch.tanh, h, use_reentrant=True))),
        lambda: Each(Layer(lambda h: checkpoint(torch.tanh, h, use_reentrant=False))),
        module="function",
    ),
    "batch norm": Case(
        "coupled-samples",
        lambda: sequence(nn.BatchNorm1d(5), nn.Tanh()),
        lambda: sequence(nn.LayerNorm(5), nn.Tanh()),
        severity="warning",
    ),
    "batch norm in eval mode": Case(
        "coupled-samples",
        lambda: sequence(nn.BatchNorm1d(5), nn.Tanh()),
        lambda: sequence(nn.BatchNorm1d(5), nn.Tanh()).eval(),
        lambda: gpkit.r1(estimator="finite_difference"),
        severity="warning",
    ),
    "dropout": Case(
        "random-forward",
        lambda: sequence(nn.Tanh(), nn.Dropout(0.5)),
        lambda: sequence(nn.Tanh(), nn.Dropout(0.0)),
        module="2",
        severity="note",
    ),
    "in place": Case(
        "in-place",
        lambda: nn.Sequential(nn.ReLU(inplace=True), *smooth().children()),
        lambda: nn.Sequential(nn.ReLU(), *smooth().children()),
        module="0",
    ),
    "piecewise-linear": Case(
        "piecewise-linear",
        lambda: sequence(nn.ReLU()),
        lambda: sequence(nn.GELU()),
        gpkit.curvature,
        module="1",
    ),
    "leaky": Case(
        "piecewise-linear",
        lambda: sequence(nn.LeakyReLU()),
        lambda: sequence(nn.SiLU()),
        lambda: gpkit.curvature(order=3),
        module="1",
    ),
    "mean loss": Case(
        "mean-loss",
        lambda: Each(Layer(torch.tanh), outputs=3),
        lambda: Each(Layer(torch.tanh), outputs=3),
        gpkit.input_grad_norm,
        example=classes,
        loss=F.cross_entropy,
        other_loss=lambda out, y: F.cross_entropy(out, y, reduction="none"),
    ),
    "integers": Case(
        "integer-input",
        lambda: nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 1)),
        lambda: nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 1)),
        gpkit.input_grad_norm,
        gpkit.weight_grad_norm,
        example=lambda: torch.randint(7, (B, 3)),
    ),
    "frozen": Case(
        "frozen", lambda: frozen(sequence(nn.Tanh())), lambda: sequence(nn.Tanh()), severity="note"
    ),
    "tied": Case("tied", lambda: Tied(True), lambda: Tied(False), severity="note"),
    "not trained": Case("untrained", lambda: nn.Linear(N, 1), smooth, gpkit.curvature),
    "zero": Case("zero", lambda: scaled(smooth(), 0.0), smooth, severity="warning"),
    "strong": Case(
        "strength",
        smooth,
        smooth,
        lambda: gpkit.r1(1e6),
        lambda: gpkit.r1(0.0001),
        severity="warning",
    ),
    "root of zero": Case(
        "not-finite",
        lambda: Each(Layer(lambda h: (h * 0).square().sum(1, keepdim=True).sqrt() + h)),
        lambda: Each(Layer(lambda h: (h * 0).square().sum(1, keepdim=True) + h.tanh())),
        module="function",
    ),
    "norm of zero": Case(
        "not-finite",
        of_nothing(lambda h: h.norm(dim=1, keepdim=True)),
        of_nothing(lambda h: (h.square().sum(1, keepdim=True) + 1e-6).sqrt()),
        module="function",
    ),
    "third derivative": Case(
        "not-finite",
        of_nothing(lambda h: h.abs() ** 2.5),
        of_nothing(lambda h: h.abs() ** 2.5),
        lambda: gpkit.curvature(),
        gpkit.r1,
        module="function",
    ),
    "checkpoint of no gradient": Case(
        "untracked",
        lambda: Parts(reentrant),
        lambda: Parts(lambda part, x: checkpoint(part, x, use_reentrant=False)),
        lambda: gpkit.weight_grad_norm(estimator="finite_difference"),
        example=classes,
        severity="warning",
    ),
    "no_grad": Case(
        "untracked",
        lambda: Parts(under(torch.no_grad)),
        lambda: Parts(under(torch.enable_grad)),
        gpkit.jacobian,
        example=classes,
        severity="warning",
    ),
    "inference mode": Case(
        "memory-freed",
        lambda: Each(Layer(constant(torch.inference_mode))),
        lambda: Each(Layer(constant(torch.no_grad))),
    ),
    "cost": Case("cost", smooth, smooth, severity="note", options={"costs": True}),
    "infinite output": Case(
        "not-finite",
        lambda: Each(Layer(lambda h: h.tanh() / 0)),
        smooth,
        module="function",
    ),
    "bias of an estimate": Case(
        "biased-estimate",
        lambda: Each(Layer(torch.tanh), outputs=3),
        lambda: Each(Layer(torch.tanh), outputs=3),
        lambda: gpkit.jacobian(form="norm", estimator="projection"),
        lambda: gpkit.jacobian(estimator="projection"),
        severity="warning",
    ),
    "float16": Case(
        "float16-underflow",
        lambda: scaled(smooth(), 1e-4),
        smooth,
        severity="note",
    ),
    "environments": Case(
        "convention",
        lambda: Each(Layer(torch.tanh), outputs=3),
        lambda: Each(Layer(torch.tanh), outputs=3),
        gpkit.irm,
        lambda: gpkit.irm(reduce="sum"),
        example=classes,
        severity="note",
    ),
    "patches": Case(
        "convention",
        lambda: Each(Layer(torch.tanh), outputs=4),
        lambda: Each(Layer(torch.tanh), outputs=4),
        gpkit.zero_gp,
        gpkit.jacobian,
        severity="note",
    ),
    "missing target": Case(
        "call",
        smooth,
        smooth,
        gpkit.sobolev,
        gpkit.r1,
    ),
}
