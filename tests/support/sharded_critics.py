"""Critics that FSDP2 shards, and how they are trained: with gpkit, and by hand in one process.

`by_hand` functions never use gpkit. Losses are means over the batch, so the mean over two processes
with a half each is the loss of one process.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ranks
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import gpkit

B, STEPS, SIDE, WIDTH = 4, 3, 4, 6
GAMMA, LAMBDA = 2.0, 10.0


class Block(nn.Module):
    """A transformer block in elementary operations."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 9), nn.SiLU(), nn.Linear(9, WIDTH))
        self.checkpointed = False

    def mixed(self, h):
        # torch's own layer norm has a wrong third derivative
        normed = (h - h.mean(-1, True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        q, k, v = self.qkv(normed).chunk(3, -1)  # [B, T, WIDTH] each
        h = h + (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
        return h + self.mlp(h)

    def forward(self, h):
        if self.checkpointed:
            return checkpoint(self.mixed, h, use_reentrant=False)
        return self.mixed(h)


class Critic(nn.Module):
    """Scores images [B, 1, 4, 4] by three blocks; ``outside``: checkpoints around the blocks."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)
        self.outside = False
        self.to(dtype)

    def tokens(self, x):
        h = self.patches(x).flatten(2).mT  # [B, T, WIDTH]
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.outside else block(h)
        return h

    def forward(self, x):
        return self.head(self.tokens(x).mean(1)).squeeze(1)  # [B]


def sharded(critic, how="blocks", mesh=None, **options):
    """Shard each block, or each layer, and the whole; or the whole alone."""
    if mesh is not None:
        options["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("copy", "shard"))
    if how == "checkpointed":
        for block in critic.blocks:
            block.checkpointed = True
    critic.outside = how == "checkpoint outside"
    freeze(critic, how)
    for block in critic.blocks if how != "whole" else []:
        fully_shard(block, **options)
    for layer in (critic.patches, critic.head) if how == "layers" else ():
        fully_shard(layer, **options)
    return fully_shard(critic, **options)


def freeze(critic, how):
    critic.blocks[1].requires_grad_(how != "frozen")


def data(dtype=torch.float64):
    """Pairs of unequal real and fake images."""
    rng = torch.Generator().manual_seed(1)
    shape = 2, STEPS, B, 1, SIDE, SIDE
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    return (x * torch.linspace(0.2, 2, B, dtype=x.dtype).reshape(-1, 1, 1, 1)).to(dtype)


def adversarial(critic, real, fake):
    return F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()


def slopes(f, x):
    """‖∇f‖² of each sample, by hand."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return g.flatten(1).square().sum(1)


def between(real, fake):
    return 0.3 * real + 0.7 * fake


# What is trained on: with gpkit, and by hand.


def r1_r2(critic, real, fake, penalty):
    return adversarial(critic, real, fake) + penalty(critic, real=real, fake=fake)


def r1_r2_by_hand(critic, real, fake, step):
    gp = GAMMA / 2 * (slopes(critic, real).mean() + slopes(critic, fake).mean())
    return adversarial(critic, real, fake) + gp


def before(critic, real, fake, penalty):
    """The penalty first, of a net in a function; a look without a graph between the two."""
    value = penalty(lambda x: critic(x), real=real, fake=fake)
    with torch.no_grad():
        critic(real)
    return value + adversarial(critic, real, fake)


def alone(critic, real, fake, penalty):
    """The penalty alone, as where it has optimiser steps of its own."""
    return penalty(critic, real=real, fake=fake)


def alone_by_hand(critic, real, fake, step):
    return GAMMA / 2 * (slopes(critic, real).mean() + slopes(critic, fake).mean())


def on_scores(critic, real, fake, penalty):
    """The graph of the scores, which the loss uses as well."""
    real = real.clone().requires_grad_()
    of_real = critic(real)
    loss = F.softplus(-of_real).mean() + F.softplus(critic(fake)).mean()
    return loss + penalty(of_real, real)


def r1_by_hand(critic, real, fake, step):
    return adversarial(critic, real, fake) + GAMMA / 2 * slopes(critic, real).mean()


def lazy_by_hand(critic, real, fake, step):
    gp = GAMMA * slopes(critic, real).mean() if step % 2 == 0 else 0.0
    return adversarial(critic, real, fake) + gp


def wgan_by_hand(critic, real, fake, step):
    n = slopes(critic, between(real, fake)).sqrt()
    return adversarial(critic, real, fake) + LAMBDA * (n - 1).square().mean()


def second_by_hand(critic, real, fake, step):
    """‖∇²D‖_F² of each image, entry by entry."""
    x = real.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(e.sum(), x, create_graph=True)[0] for e in g.flatten(1).unbind(1)]
    n2 = sum(row.flatten(1).square().sum(1) for row in rows)
    return adversarial(critic, real, fake) + 0.1 * n2.mean()


def activation_by_hand(critic, real, fake, step):
    h = critic.blocks[0](critic.patches(real).flatten(2).mT)

    def rest(h):
        for block in critic.blocks[1:]:
            h = block(h)
        return critic.head(h.mean(1))

    (g,) = torch.autograd.grad(rest(h).sum(), h, create_graph=True)
    gp = GAMMA / 2 * g.flatten(1).square().sum(1).mean()
    return adversarial(critic, real, fake) + gp


def inner_by_hand(critic, real, fake, step):
    return activation_by_hand(critic, real, fake, step) - adversarial(critic, real, fake)


def inner(critic, real, fake, penalty):
    return penalty(critic, critic, real=real)


def with_critic(critic, real, fake, penalty):
    return adversarial(critic, real, fake) + penalty(critic, critic, real=real)


def derivative(critic, real, fake, penalty):
    """No penalty, but a derivative that is taken by torch itself."""
    with gpkit.unsharded(critic):
        total = r1_by_hand(critic, real, fake, 0)
        total.backward()


R1, R2 = partial(gpkit.r1, GAMMA), partial(gpkit.r1_r2, GAMMA)
WGAN = partial(gpkit.GradientPenalty, at=between, form=gpkit.two_sided(1.0), weight=LAMBDA)
SECOND = partial(gpkit.GradientPenalty, order=2, weight=0.1, at="real", estimator="exact")


@dataclass(frozen=True)
class Case:
    """A way to train a sharded critic.

    Args:
        total: ``(critic, real, fake, penalty) -> total``; None if it ran the backward pass itself.
        by_hand: ``(critic, real, fake, step) -> total``, of a critic in one process.
        penalty: makes the penalty.
        how: which modules are sharded.
        options: of fully_shard.
        tolerance: of the parameters after the last step.
    """

    total: Any
    by_hand: Any
    penalty: Any = R2
    how: str = "blocks"
    options: dict = field(default_factory=dict)
    tolerance: float = 1e-14


CASES = {
    "R1 + R2": Case(r1_r2, r1_r2_by_hand),
    "R1 + R2, one group for all weights": Case(r1_r2, r1_r2_by_hand, how="whole"),
    "R1 + R2, a frozen block": Case(r1_r2, r1_r2_by_hand, how="frozen"),
    "R1 + R2, weights kept after the forward": Case(
        r1_r2, r1_r2_by_hand, options={"reshard_after_forward": False}
    ),
    "R1 + R2, copies (HSDP)": Case(r1_r2, r1_r2_by_hand, options={"mesh": (2, 1)}),
    "R1 + R2, checkpointing in the blocks": Case(r1_r2, r1_r2_by_hand, how="checkpointed"),
    "R1 + R2, checkpointing of the blocks": Case(r1_r2, r1_r2_by_hand, how="checkpoint outside"),
    "R1 + R2 before the loss, of a lambda": Case(before, r1_r2_by_hand),
    "R1 + R2 before the loss, one group for each layer": Case(before, r1_r2_by_hand, how="layers"),
    "R1 + R2 alone, with a step of its own": Case(alone, alone_by_hand),
    "R1 on the graph of the scores": Case(on_scores, r1_by_hand, R1),
    "R1 on every second step": Case(r1_r2, lazy_by_hand, partial(R1, every=2)),
    "WGAN-GP": Case(r1_r2, wgan_by_hand, WGAN),
    "second order": Case(r1_r2, second_by_hand, SECOND),
    "R1 of an activation": Case(
        with_critic, activation_by_hand, partial(R1, wrt=gpkit.activation("blocks.0"))
    ),
    "R1 between two activations, one group, alone": Case(
        inner,
        inner_by_hand,
        partial(R1, of=gpkit.activation("head"), wrt=gpkit.activation("blocks.0")),
        how="whole",
    ),
    "gpkit.unsharded, a derivative by torch": Case(derivative, r1_by_hand, gpkit.none),
}


def half(batch, rank):
    size = len(batch) // ranks.RANKS
    return batch[rank * size :][:size]


def trained(rank, name):
    """Return the weights of a case as this process trains them, and their kinds at each stage."""
    case = CASES[name]
    critic = sharded(Critic(), case.how, **case.options)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9)
    penalty, kinds = case.penalty(), set()
    for real, fake in zip(*data(), strict=True):
        optimizer.zero_grad()
        total = case.total(critic, half(real, rank), half(fake, rank), penalty)
        if total is not None:
            total.backward()
        kinds |= {type(p).__name__ for p in critic.parameters()}
        optimizer.step()
    return [p.full_tensor().detach() for p in critic.parameters()], kinds


def expected(case):
    """Return the same, trained in one process by hand."""
    critic = Critic()
    freeze(critic, case.how)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9)
    for step, (real, fake) in enumerate(zip(*data(), strict=True)):
        optimizer.zero_grad()
        case.by_hand(critic, real, fake, step).backward()
        optimizer.step()
    return [p.detach() for p in critic.parameters()]
