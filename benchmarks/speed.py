"""What penalties cost beside the same step by hand, in one thread, steps taking turns.

python benchmarks/speed.py       two minutes; prints the rows of speed.md
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpkit

Step = Callable[[], object]


def mlp(*widths: int, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Return an MLP of these widths."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def times(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each step in each round; the steps of a round take turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            found[name].append(time.process_time() - start)
    return found


def ratio(a: list[float], b: list[float]) -> str:
    """Return the quartiles of a / b over the rounds, and the ratio of the least of each."""
    low, middle, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}], least {min(a) / min(b):.2f}"


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

    difference = gpkit.weight_grad_norm(0.1, estimator="finite_difference")
    ours_of = {"difference": ours(difference), "gnp": ours(gpkit.gnp())}
    steps = {"plain": plain, "sam": sam, "difference by hand": by_hand, **ours_of}
    found = times(steps, rounds)
    for name in ("difference by hand", "difference", "gnp"):
        for base in ("plain", "sam"):
            against = "plain steps" if base == "plain" else "a step of SAM by hand"
            print(f"| {name}, width {width}, B {batch}: / {against} | ", end="")
            print(ratio(found[name], found[base]), "|")


def layers(width: int, batch: int, rounds: int) -> None:
    """Exact norms of the batch's and of each sample's gradient in the weights, by layers."""
    net, x = mlp(64, width, width, width, 10), torch.randn(batch, 64)
    t, params = torch.randint(10, (batch,)), list(net.parameters())

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
        linear = [layer for layer in net if isinstance(layer, nn.Linear)]
        record = lambda _, given, z: calls.append((given[0], z))  # noqa: E731
        hooks = [layer.register_forward_hook(record) for layer in linear]
        own = loss("none")
        for hook in hooks:
            hook.remove()
        deltas = torch.autograd.grad(own.sum(), [z for _, z in calls], create_graph=True)
        pairs = zip(calls, deltas, strict=True)
        n2 = sum(d.square().sum(1) * (a.square().sum(1) + 1) for (a, _), d in pairs)
        (own.mean() + 0.1 * n2.mean()).backward()

    def ours(penalty: gpkit.GradientPenalty, reduction: str) -> Step:
        def step() -> None:
            net.zero_grad()
            penalty.with_loss(lambda: loss(reduction), net).backward()

        return step

    steps = {
        "plain": plain,
        "weight_grad_norm by hand": by_hand,
        "weight_grad_norm": ours(gpkit.weight_grad_norm(0.1), "mean"),
        "per_sample_grad_norm by hand, for such a net": ghost,
        "per_sample_grad_norm": ours(gpkit.per_sample_grad_norm(0.1), "none"),
    }
    found = times(steps, rounds)
    for name in [*steps][1:]:
        against = ratio(found[name], found["plain"])
        print(f"| {name}, width {width}, B {batch}: / plain steps | {against} |")


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()  # a collection would fall on one step or another
    print(f"| case, torch {torch.__version__} | median of the ratios [quartiles] |\n| --- | --- |")
    for width in (16, 64):
        call(width)
    for width, batch, rounds in ((64, 64, 150), (64, 256, 150), (512, 256, 20), (1024, 64, 20)):
        sharpness(width, batch, rounds)
    for width, rounds in ((512, 30), (1024, 15)):
        layers(width, 64, rounds)
    series()
    if "--no-part" not in sys.argv:
        part()
