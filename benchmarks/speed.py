"""What penalties cost beside the same step by hand, in one thread, steps taking turns.

python benchmarks/speed.py                a minute; prints the rows of speed.md
python benchmarks/speed.py taylor         only the cases with this in their names
python benchmarks/speed.py --give-back    with memory that goes back to the system, see timing.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import Step, mlp, prepare, ratio, times
from torch import Tensor, nn
from torch.nn import functional as F

import gpkit


def call(width: int) -> None:
    """A call with a module, a lambda made anew, and scores, against the same by hand."""
    critic, x, y = mlp(64, width, width, width, 1), torch.randn(256, 64), torch.randn(256, 64)
    leaf = x.clone().requires_grad_()

    def by_hand(f: Callable[[Tensor], Tensor] = critic) -> Tensor:
        z = (y + torch.rand(256, 1) * (x - y)).requires_grad_()
        (g,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
        return 10 * ((g.square().sum(1).sqrt() - 1) ** 2).mean()

    def r1_by_hand() -> Tensor:
        (g,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
        return 5 * g.square().sum(1).mean()

    module, function, scores = gpkit.wgan_gp(), gpkit.wgan_gp(), gpkit.r1()
    cases: dict[str, tuple[Step, Step]] = {
        "wgan_gp(critic)": (by_hand, lambda: module(critic, real=x, fake=y)),
        "wgan_gp(lambda z: critic(z))": (
            lambda: by_hand(lambda z: critic(z)),
            lambda: function(lambda z: critic(z), real=x, fake=y),
        ),
        "r1(scores, x)": (r1_by_hand, lambda: scores(critic(leaf), leaf)),
    }
    for name, (hand, ours) in cases.items():
        found = times({"hand": hand, "gpkit": ours}, 600)
        least = {own: min(each) * 1e6 for own, each in found.items()}
        print(
            f"| {name}, width {width}, B 256: call / by hand | "
            f"{ratio(found['gpkit'], found['hand'])}; "
            f"{least['gpkit'] - least['hand']:.0f} µs more than {least['hand']:.0f} |"
        )


def sharpness(width: int, batch: int, rounds: int) -> None:
    """Finite differences in the weights and gnp, against a plain step and one of SAM by hand."""
    net, x = mlp(64, width, width, width, 10), torch.randn(batch, 64)
    t, params = torch.randint(10, (batch,)), list(net.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(net(x), t)

    def plain() -> None:
        net.zero_grad()
        loss().backward()

    def sam() -> None:
        plain()
        grads = [p.grad for p in params]
        with torch.no_grad():
            n = torch.stack(torch._foreach_norm(grads)).norm()
            move = torch._foreach_mul(grads, 0.05 / (n + 1e-12))
            torch._foreach_add_(params, move)
        plain()
        with torch.no_grad():
            torch._foreach_sub_(params, move)

    def by_hand() -> None:
        net.zero_grad()
        grads = torch.autograd.grad(loss(), params)
        h = 7e-4 / torch.stack(torch._foreach_norm(grads)).norm()
        values = [p.data for p in params]
        for p, moved in zip(params, torch._foreach_add(values, grads, alpha=float(h)), strict=True):
            p.data = moved
        there = torch.autograd.grad(loss(), params)
        for p, value in zip(params, values, strict=True):
            p.data = value
        torch._foreach_lerp_(grads, there, 0.2 / float(h))
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def ours(penalty: gpkit.GradientPenalty) -> Step:
        def step() -> None:
            net.zero_grad()
            penalty.with_loss(loss, net).backward()

        return step

    def difference() -> gpkit.GradientPenalty:
        return gpkit.weight_grad_norm(0.1, estimator="finite_difference")

    module = gpkit.PenalizedModule(net, F.cross_entropy, difference())

    def in_module() -> None:
        net.zero_grad()
        module.penalized_loss((x, t)).backward()

    ours_of = {"difference": ours(difference()), "gnp": ours(gpkit.gnp())}
    others = {"plain": plain, "sam": sam}
    for steps in (
        {**others, "difference by hand": by_hand, **ours_of},
        {**others, "difference in PenalizedModule": in_module},
    ):
        found = times(steps, rounds)
        for name in [*steps][2:]:
            for base in others:
                against = "plain steps" if base == "plain" else "a step of SAM by hand"
                print(f"| {name}, width {width}, B {batch}: / {against} | ", end="")
                print(ratio(found[name], found[base]), "|")


class Block(nn.Module):
    """A block of a transformer of width d."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, and take the MLP."""
        parts = self.qkv(self.before(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Tokens(nn.Module):
    """Two blocks on tokens, and a head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(100, 128), nn.LayerNorm(128)
        self.blocks, self.head = nn.Sequential(Block(128, 4), Block(128, 4)), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.norm(self.blocks(self.embedding(x))).mean(1))


def images() -> nn.Sequential:
    """Return a small convolutional net."""
    layers: list[nn.Module] = []
    for a, b, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def layers(where: str, net: nn.Module, x: Tensor, rounds: int, ghosts: str = "") -> None:
    """Exact norms of the batch's and of each sample's gradient in the weights, by layers.

    Args:
        where: the setting in words.
        net: the net.
        x: its inputs.
        rounds: how many.
        ghosts: whether the net has linear layers on rows alone, for which the norms of samples are
            a few lines by hand.
    """
    t, params = torch.randint(10, (len(x),)), list(net.parameters())

    def loss(reduction: str = "mean") -> Tensor:
        return F.cross_entropy(net(x), t, reduction=reduction)

    def plain() -> None:
        net.zero_grad()
        loss().backward()

    def by_hand() -> None:
        net.zero_grad()
        own = loss()
        grads = torch.autograd.grad(own, params, create_graph=True)
        (own + 0.1 * sum(g.square().sum() for g in grads)).backward()

    def ghost() -> None:
        net.zero_grad()
        calls: list[tuple[Tensor, Tensor]] = []
        linear = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
        record = lambda _, given, z: calls.append((given[0], z))  # noqa: E731
        hooks = [layer.register_forward_hook(record) for layer in linear]
        own = loss("none")
        for hook in hooks:
            hook.remove()
        deltas = torch.autograd.grad(own.sum(), [z for _, z in calls], create_graph=True)
        pairs = zip(calls, deltas, strict=True)
        n2 = sum(d.square().sum(1) * (a.square().sum(1) + 1) for (a, _), d in pairs)
        (own.mean() + 0.1 * n2.mean()).backward()

    def together(penalty: gpkit.GradientPenalty, reduction: str) -> Step:
        def step() -> None:
            net.zero_grad()
            penalty.with_loss(lambda: loss(reduction), net).backward()

        return step

    def added(penalty: gpkit.GradientPenalty) -> Step:
        def step() -> None:
            net.zero_grad()
            own = loss()
            (own + penalty(own, net.parameters())).backward()

        return step

    def alone(penalty: gpkit.GradientPenalty) -> Step:
        def step() -> None:
            net.zero_grad()
            penalty(loss, net).backward()

        return step

    def in_module(penalty: gpkit.GradientPenalty) -> Step:
        module = gpkit.PenalizedModule(net, F.cross_entropy, penalty)

        def step() -> None:
            net.zero_grad()
            module.penalized_loss((x, t)).backward()

        return step

    steps = {
        "plain": plain,
        "weight_grad_norm by hand": by_hand,
        "weight_grad_norm": together(gpkit.weight_grad_norm(0.1), "mean"),
        "loss + weight_grad_norm(loss, parameters)": added(gpkit.weight_grad_norm(0.1)),
        "weight_grad_norm(closure, net), without the loss": alone(gpkit.weight_grad_norm(0.1)),
        "per_sample_grad_norm": together(gpkit.per_sample_grad_norm(0.1), "none"),
    }
    if ghosts:
        steps[f"per_sample_grad_norm by hand, {ghosts}"] = ghost
    modules = {
        "plain": plain,
        "weight_grad_norm in PenalizedModule": in_module(gpkit.weight_grad_norm(0.1)),
        "per_sample_grad_norm in PenalizedModule": in_module(gpkit.per_sample_grad_norm(0.1)),
    }
    math = torch.nn.attention.SDPBackend.MATH
    for some in (steps, modules):
        with torch.nn.attention.sdpa_kernel(math):  # the fused one has no double backward
            found = times(some, rounds)
        for name in [*some][1:]:
            print(f"| {name}, {where}: / plain steps | {ratio(found[name], found['plain'])} |")


def part() -> None:
    """A critic's step with a penalty on a quarter of the samples, against all of them."""
    critic = mlp(64, 512, 512, 512, 1)
    x, y = torch.randn(256, 64), torch.randn(256, 64)

    def by_hand(count: int) -> Tensor:
        a, b = x[:count], y[:count]
        z = (b + torch.rand(count, 1) * (a - b)).requires_grad_()
        (g,) = torch.autograd.grad(critic(z).sum(), z, create_graph=True)
        return 10 * ((g.square().sum(1).sqrt() - 1) ** 2).mean()

    def step(penalty: Callable[[], Tensor] | None = None) -> Step:
        def run() -> None:
            critic.zero_grad()
            loss = critic(y).mean() - critic(x).mean()
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()

        return run

    whole, quarter, r1 = gpkit.wgan_gp(), gpkit.wgan_gp(subsample=0.25), gpkit.r1(subsample=0.25)
    steps = {
        "plain": step(),
        "wgan_gp by hand": step(lambda: by_hand(256)),
        "wgan_gp": step(lambda: whole(critic, real=x, fake=y)),
        "wgan_gp by hand on a quarter": step(lambda: by_hand(64)),
        "wgan_gp, subsample=0.25": step(lambda: quarter(critic, real=x, fake=y)),
        "r1, subsample=0.25": step(lambda: r1(critic, real=x)),
    }
    found = times(steps, 30)
    for name in [*steps][1:]:
        against = ratio(found[name], found["plain"])
        print(f"| critic's step with {name}, width 512, B 256: / plain steps | {against} |")


def series() -> None:
    """Taylor mode, against a plain step."""
    net, x = mlp(3, 64, 64, 64, 1, act=nn.Tanh), torch.randn(128, 3)

    def plain() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    def step(order: int) -> Step:
        penalty = gpkit.GradientPenalty(order=order, estimator=gpkit.taylor())

        def run() -> None:
            net.zero_grad()
            penalty(net, x).backward()

        return run

    found = times({"plain": plain, **{str(k): step(k) for k in (2, 3, 4)}}, 150)
    for k in (2, 3, 4):
        print(
            f"| taylor, order {k}, B 128: / plain steps | {ratio(found[str(k)], found['plain'])} |"
        )


def cases() -> dict[str, Callable[[], None]]:
    """Return what is measured, by a name."""
    found: dict[str, Callable[[], None]] = {}
    for width in (16, 64):
        found[f"call width {width}"] = partial(call, width)
    for width, batch, rounds in ((64, 64, 150), (64, 256, 150), (512, 256, 20), (1024, 64, 20)):
        found[f"sharpness width {width} B {batch}"] = partial(sharpness, width, batch, rounds)
    for width, batch, rounds in ((64, 256, 150), (512, 64, 60), (512, 256, 20), (1024, 64, 20)):
        net, x = mlp(64, width, width, width, 10), torch.randn(batch, 64)
        where, ghosts = f"width {width}, B {batch}", "for linear layers alone"
        found[f"layers {where}"] = partial(layers, where, net, x, rounds, ghosts)
    where = "two transformer blocks, width 128, T 32, B 32"
    found[where] = partial(layers, where, Tokens(), torch.randint(100, (32, 32)), 8)
    where = "three convolutions, 32×32, B 32"
    found[where] = partial(layers, where, images(), torch.randn(32, 3, 32, 32), 8)
    return {**found, "taylor": series, "part": part}


if __name__ == "__main__":
    prepare()
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    print(f"| case, torch {torch.__version__} | median of the ratios [quartiles] |\n| --- | --- |")
    for name, case in cases().items():
        if all(word in name for word in words):
            case()
