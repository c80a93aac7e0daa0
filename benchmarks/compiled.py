"""What `gpkit.compile` saves, in plain eager steps of the same net, in one thread, taking turns.

python benchmarks/compiled.py               about ten minutes; prints the rows of speed.md
python benchmarks/compiled.py taylor        only the cases with this in their names
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from timing import mlp, prepare, ratio, times
from torch import Tensor, nn
from torch.nn import functional as F

import gpkit

Loss = Callable[..., Tensor]


def case(name: str, net: nn.Module, plain: Loss, loss: Loss, *batch: Tensor, rounds: int) -> None:
    """Print the time of the loss, eager and compiled, in steps of the plain one."""
    if not all(word in name for word in sys.argv[1:]):
        return

    def step(function: Loss) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad()
            function(*batch).backward()

        return run

    compiled = gpkit.compile(loss, measure=False)
    start = time.perf_counter()
    step(compiled)()
    seconds = time.perf_counter() - start
    assert compiled.obstacle is None, compiled.obstacle
    bare = torch.compile(plain)
    steps = {"plain": plain, "eager": loss, "compiled": compiled, "bare": bare}
    found = times({key: step(f) for key, f in steps.items()}, rounds)
    cells = [ratio(found[key], found["plain"]) for key in ("eager", "compiled", "bare")]
    print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} s |", flush=True)


def critics() -> None:
    """A critic's step of WGAN-GP."""
    conv = nn.Sequential(
        *[nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.SiLU()],
        *[nn.Conv2d(64, 128, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(2048, 1)],
    )
    image = torch.randn(32, 3, 32, 32), torch.randn(32, 3, 32, 32)
    rows = torch.randn(256, 64), torch.randn(256, 64)
    for name, critic, batch, rounds in (
        ("width 64, B 256", mlp(64, 64, 64, 64, 1), rows, 200),
        ("width 512, B 256", mlp(64, 512, 512, 512, 1), rows, 40),
        ("convolutions, B 32", conv, image, 30),
    ):
        penalty = gpkit.wgan_gp()

        def plain(x: Tensor, y: Tensor, critic: nn.Module = critic) -> Tensor:
            return critic(y).mean() - critic(x).mean()

        def loss(
            x: Tensor,
            y: Tensor,
            critic: nn.Module = critic,
            penalty: gpkit.GradientPenalty = penalty,
        ) -> Tensor:
            return critic(y).mean() - critic(x).mean() + penalty(critic, real=x, fake=y)

        case(f"wgan_gp, {name}", critic, plain, loss, *batch, rounds=rounds)


def classifiers() -> None:
    """A classifier's step with a penalty in its inputs, and in its weights."""
    for width, batch, rounds in ((64, 256, 200), (512, 256, 40)):
        net = mlp(64, width, width, width, 10)
        x, y = torch.randn(batch, 64, requires_grad=True), torch.randint(10, (batch,))
        inputs, weights = gpkit.input_grad_norm(), gpkit.weight_grad_norm()

        def plain(x: Tensor, y: Tensor, net: nn.Module = net) -> Tensor:
            return F.cross_entropy(net(x), y)

        def in_inputs(
            x: Tensor,
            y: Tensor,
            net: nn.Module = net,
            penalty: gpkit.GradientPenalty = inputs,
        ) -> Tensor:
            losses = F.cross_entropy(net(x), y, reduction="none")
            return losses.mean() + penalty(losses, x)

        def in_weights(
            x: Tensor,
            y: Tensor,
            net: nn.Module = net,
            penalty: gpkit.GradientPenalty = weights,
        ) -> Tensor:
            return penalty.with_loss(lambda: F.cross_entropy(net(x), y), net)

        where = f"width {width}, B {batch}"
        case(f"input_grad_norm, {where}", net, plain, in_inputs, x, y, rounds=rounds)
        x = x.detach()
        case(f"weight_grad_norm, {where}", net, plain, in_weights, x, y, rounds=rounds)


def layers() -> None:
    """A penalty in the weights by Gram matrices, and one of each sample's gradient."""
    for width, batch, rounds in ((512, 64, 60), (1024, 64, 20)):
        net = mlp(64, width, width, width, 10)
        x, y = torch.randn(batch, 64), torch.randint(10, (batch,))

        def plain(x: Tensor, y: Tensor, net: nn.Module = net) -> Tensor:
            return F.cross_entropy(net(x), y)

        for name, make, reduction in (
            ("weight_grad_norm", gpkit.weight_grad_norm, "mean"),
            ("per_sample_grad_norm", gpkit.per_sample_grad_norm, "none"),
        ):
            penalty = make(0.1)

            def loss(
                x: Tensor,
                y: Tensor,
                net: nn.Module = net,
                penalty: gpkit.GradientPenalty = penalty,
                reduction: str = reduction,
            ) -> Tensor:
                return penalty.with_loss(
                    lambda: F.cross_entropy(net(x), y, reduction=reduction), net
                )

            case(f"{name}, width {width}, B {batch}", net, plain, loss, x, y, rounds=rounds)


def series() -> None:
    """Taylor mode."""
    for order in (2, 3, 4):
        net, x = mlp(3, 64, 64, 64, 1, act=nn.Tanh), torch.randn(128, 3)
        penalty = gpkit.GradientPenalty(order=order, estimator=gpkit.taylor())

        def plain(x: Tensor, net: nn.Module = net) -> Tensor:
            return net(x).square().mean()

        def loss(
            x: Tensor, net: nn.Module = net, penalty: gpkit.GradientPenalty = penalty
        ) -> Tensor:
            return penalty(net, x)

        case(f"taylor, order {order}, B 128", net, plain, loss, x, rounds=300)


if __name__ == "__main__":
    prepare()
    print(
        f"| case, torch {torch.__version__} | eager | compiled | plain step compiled | first step |"
    )
    print("| --- | --- | --- | --- | --- |")
    critics()
    classifiers()
    layers()
    series()
