"""The net, the samples and the targets of a configuration, in its dtype."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.property.config import Config
from tests.property.nets import KINDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32}  # bfloat16: autocast
SIZES = (0.05, 2.0, 0.5, 4.0, 1.0)


@dataclass
class Problem:
    """What a penalty is called with, and the twin in float64 that the oracle differentiates."""

    net: nn.Module
    twin: nn.Module
    base: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # without a graph: real, fake
    shift: Tensor  # the parameter of a generator that scales the samples
    target: Tensor  # [B, m]
    labels: Tensor  # [B]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    def samples(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return generated(self.base, self.shift)


def generated(base: Any, shift: Tensor) -> Any:
    """Return real and fake samples, with a graph to the generator's parameter."""
    return tuple(tuple(x * (1 + shift) if x.is_floating_point() else x for x in xs) for xs in base)


def problem(c: Config) -> Problem:
    """Return nets and samples of unequal slopes, from the seed alone."""
    torch.manual_seed(c.seed)
    kind, dtype = KINDS[c.net], DTYPES.get(c.dtype, torch.float64)
    net = kind.build(c.outputs, False).double()  # a complex parameter stays
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
        for b in net.buffers():
            if b.is_floating_point() and "running" in "".join(
                n for n, x in net.named_buffers() if x is b
            ):
                b.add_(0.3)
    size = torch.tensor(SIZES).double()[torch.randperm(5)][: c.batch]
    base = tuple(tuple(sample(c, shape, size) for shape in kind.shapes) for _ in ("real", "fake"))
    net = net if c.net == "waves" else net.to(dtype)
    base = tuple(tuple(x.to(dtype) if x.is_floating_point() else x for x in xs) for xs in base)
    shift = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    target = torch.randn(c.batch, c.outputs, dtype=torch.float64).to(dtype)
    labels = torch.randint(c.outputs, (c.batch,))
    return Problem(net, twin(net, c), base, shift, target, labels)


def dimensions(c: Config, p: Problem) -> tuple[int, list[Any]]:
    """Return the number of outputs m, and the shapes of the variables."""
    caught: list[Tensor] = []
    hook = p.twin.act.register_forward_hook(lambda module, args, out: caught.append(out))
    with torch.no_grad():
        state = copy.deepcopy(p.twin.state_dict())
        y = p.twin(*[x.double() if x.is_floating_point() else x for x in p.base[0]])
        p.twin.load_state_dict(state)
    hook.remove()
    y = y["logits"] if isinstance(y, dict) else y
    y = caught[0] if c.of == "activation" else y
    outputs = 1 if c.of in ("loss", "column", "total", "sampled_loss") else y[0].numel()
    if c.in_weights:
        pattern = c.wrt.partition(":")[2] or "*"
        return outputs, [q.shape for n, q in p.parameters.items() if fnmatchcase(n, pattern)]
    if c.wrt == "activation":
        return outputs, [caught[0].shape[1:]]
    return outputs, [x.shape[1:] for x in p.base[0]]


def sample(c: Config, shape: tuple[int, ...], size: Tensor) -> Tensor:
    if c.net == "tokens":
        return torch.randint(5, (c.batch, *shape))
    x = torch.randn(c.batch, *shape, dtype=torch.float64)
    return x * size.reshape(-1, *[1] * len(shape))


def twin(net: nn.Module, c: Config) -> nn.Module:
    """Return the same net in elementary operations, in float64."""
    other = KINDS[c.net].build(c.outputs, True).double()
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    evaluating = c.forward == "eval" or not net.training
    return other.train(not evaluating)


def losses(c: Config, y: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each sample ``[B]`` for outputs ``[B, ...]``."""
    columns = y.reshape(len(y), -1)
    target = target.repeat_interleave(columns.shape[1] // target.shape[1], 1)
    if c.loss == "cross_entropy":
        return F.cross_entropy(columns, labels, reduction="none")
    return (columns - target).square().sum(1)
