"""gpkit beside loops by hand and beside peers from PyPI: the same numbers, at which cost?

pip install "gradpen[bench]"
python benchmarks/peers.py              two runs in processes of their own: peers.md and peers.png
python benchmarks/peers.py --run        one run, as JSON

Steps take turns in one thread, and the CPU time of each is divided by that of a plain step (a
forward and backward pass of the loss alone) in the same round. A peer that is not installed is left
out, by name.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from timing import Step, mlp, prepare, ratios, times
from torch import Tensor, nn
from torch.nn import functional as F

import gpkit

WEIGHT = 0.1
SECONDS = 4.0  # of CPU time, for the rounds of one case
SLOW = ("by hand, a loop", "torch.func vmap")  # a hundred times as long as the others
HERE = Path(__file__).parent


def stepping(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> Step:
    """Return a step that clears the gradients and takes those of a loss."""
    owned = list(parameters)

    def step() -> None:
        for p in owned:
            p.grad = None
        loss().backward()

    return step


def critics(width: int, batch: int) -> tuple[nn.Module, dict[str, Step]]:
    """A critic's step of WGAN-GP; the interpolates are drawn by each itself."""
    critic, x, y = mlp(64, width, width, width, 1), torch.randn(batch, 64), torch.randn(batch, 64)
    penalty = gpkit.wgan_gp(weight=10.0)

    def plain() -> Tensor:
        return critic(y).mean() - critic(x).mean()

    def by_hand() -> Tensor:
        z = (y + torch.rand(batch, 1) * (x - y)).requires_grad_()
        (g,) = torch.autograd.grad(critic(z).sum(), z, create_graph=True)
        return plain() + 10 * (g.norm(dim=1) - 1).square().mean()

    losses = {
        "plain": plain,
        "by hand": by_hand,
        "gpkit.wgan_gp": lambda: plain() + penalty(critic, real=x, fake=y),
    }
    return critic, {name: stepping(critic.parameters(), loss) for name, loss in losses.items()}


def inputs(width: int, batch: int) -> tuple[nn.Module, dict[str, Step]]:
    """A step of a classifier whose loss has a penalised gradient in its inputs."""
    net, x = mlp(64, width, width, width, 10), torch.randn(batch, 64)
    t, penalty = torch.randint(10, (batch,)), gpkit.input_grad_norm(weight=WEIGHT)

    def losses(z: Tensor) -> Tensor:
        return F.cross_entropy(net(z), t, reduction="none")

    def by_hand() -> Tensor:
        z = x.clone().requires_grad_()
        each = losses(z)
        (g,) = torch.autograd.grad(each.sum(), z, create_graph=True)
        return each.mean() + WEIGHT * g.square().sum(1).mean()

    def ours() -> Tensor:
        z = x.clone().requires_grad_()
        each = losses(z)
        return each.mean() + penalty(each, z)

    steps = {
        "plain": lambda: losses(x).mean(),
        "by hand": by_hand,
        "gpkit.input_grad_norm": ours,
    }
    return net, {name: stepping(net.parameters(), loss) for name, loss in steps.items()}


def weights(width: int, batch: int) -> tuple[nn.Module, dict[str, Step]]:
    """A step whose loss has a penalised gradient in the weights: exactly, or as sharpness."""
    net, x = mlp(64, width, width, width, 10), torch.randn(batch, 64)
    t, params = torch.randint(10, (batch,)), list(net.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(net(x), t)

    def by_hand() -> Tensor:
        own = loss()
        grads = torch.autograd.grad(own, params, create_graph=True)
        return own + WEIGHT * sum(g.square().sum() for g in grads)

    exact = gpkit.weight_grad_norm(weight=WEIGHT)
    differences = gpkit.weight_grad_norm(weight=WEIGHT, estimator="finite_difference")
    steps = {
        "plain": loss,
        "by hand": by_hand,
        "gpkit.weight_grad_norm": lambda: exact.with_loss(loss, net),
        "gpkit, finite_difference": lambda: differences.with_loss(loss, net),
    }
    return net, {name: stepping(params, step) for name, step in steps.items()}


def sharpness(width: int, batch: int) -> tuple[nn.Module, dict[str, Step]]:
    """A step of SGD on the loss and its sharpness; each step moves the weights by very little."""
    net, x = mlp(64, width, width, width, 10), torch.randn(batch, 64)
    t, params = torch.randint(10, (batch,)), list(net.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(net(x), t)

    penalty = gpkit.sam()
    sgd = torch.optim.SGD(params, lr=1e-9)

    def stepped(step: Step) -> Step:
        def run() -> None:
            step()
            sgd.step()

        return run

    plain = stepping(params, loss)

    def by_hand() -> None:
        plain()
        grads = [p.grad for p in params]
        with torch.no_grad():
            n = torch.stack(torch._foreach_norm(grads)).norm()
            move = torch._foreach_mul(grads, 0.05 / (n + 1e-12))
            torch._foreach_add_(params, move)
        plain()
        with torch.no_grad():
            torch._foreach_sub_(params, move)

    steps = {
        "plain": stepped(plain),
        "SAM by hand": stepped(by_hand),
        "gpkit.sam": stepped(stepping(params, lambda: penalty.with_loss(loss, net))),
    }
    try:
        from pytorch_optimizer import SAM
    except ImportError as missing:
        left_out("pytorch_optimizer", missing)
        return net, steps
    sam = SAM(params, base_optimizer=torch.optim.SGD, rho=0.05, lr=1e-9)

    def library() -> None:
        sam.zero_grad()
        loss().backward()
        sam.first_step(zero_grad=True)
        loss().backward()
        sam.second_step(zero_grad=False)

    return net, {**steps, "pytorch_optimizer.SAM": library}


def samples(width: int, batch: int) -> tuple[nn.Module, dict[str, Step]]:
    """A step whose loss has a penalised gradient of each sample in the weights."""
    net, x = mlp(64, width, width, width, 10), torch.randn(batch, 64)
    t, params = torch.randint(10, (batch,)), list(net.parameters())

    def losses() -> Tensor:
        return F.cross_entropy(net(x), t, reduction="none")

    def loop() -> Tensor:
        each, total = losses(), 0.0
        for one in each:
            grads = torch.autograd.grad(one, params, create_graph=True)
            total = total + sum(g.square().sum() for g in grads)
        return each.mean() + WEIGHT * total / batch

    def vmap() -> Tensor:
        named = dict(net.named_parameters())

        def one(p: dict[str, Tensor], z: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, p, (z[None],)), label[None])

        grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(named, x, t)
        norms = sum(g.flatten(1).square().sum(1) for g in grads.values())
        return losses().mean() + WEIGHT * norms.mean()

    penalty = gpkit.per_sample_grad_norm(weight=WEIGHT)
    found = {
        "plain": lambda: losses().mean(),
        "by hand, a loop": loop,
        "torch.func vmap": vmap,
        "gpkit.per_sample_grad_norm": lambda: penalty.with_loss(losses, net),
    }
    steps = {name: stepping(params, loss) for name, loss in found.items()}
    for add in (with_backpack, with_opacus, with_torchjd):
        try:
            steps |= add(net, x, t)
        except ImportError as missing:
            left_out(add.__name__.removeprefix("with_"), missing)
    return net, steps


def with_backpack(net: nn.Sequential, x: Tensor, t: Tensor) -> dict[str, Step]:
    """BackPACK's norms of samples, with a graph."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    own = extend(nn.Sequential(*[again(layer) for layer in net]))
    criterion, params = extend(nn.CrossEntropyLoss()), list(own.parameters())

    def step() -> None:
        for p in params:
            p.grad = None
        loss = criterion(own(x), t)
        with backpack(BatchL2Grad(), retain_graph=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of create_graph=True
            loss.backward(create_graph=True)
        norms = sum(p.batch_l2 for p in params) * len(x) ** 2  # those of losses / B
        (WEIGHT * norms.mean()).backward()
        for p, shared in zip(params, net.parameters(), strict=True):
            shared.grad = p.grad.detach()

    return {"BackPACK": step}


def again(layer: nn.Module) -> nn.Module:
    """Return a layer that shares its parameters with another."""
    if not isinstance(layer, nn.Linear):
        return type(layer)()
    own = nn.Linear(layer.in_features, layer.out_features)
    own.weight, own.bias = layer.weight, layer.bias
    return own


def with_opacus(net: nn.Sequential, x: Tensor, t: Tensor) -> dict[str, Step]:
    """The ghost norms of opacus, which have no graph: the values alone."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Clipping

    own = Clipping(nn.Sequential(*[again(layer) for layer in net]), use_ghost_clipping=True)

    def step() -> Tensor:
        F.cross_entropy(own(x), t).backward()
        return own.get_norm_sample().square()

    return {"opacus, values alone": step}


def with_torchjd(net: nn.Sequential, x: Tensor, t: Tensor) -> dict[str, Step]:
    """The diagonal of torchjd's Gramian, which has no graph: the values alone."""
    from torchjd.autogram import Engine

    own = nn.Sequential(*[again(layer) for layer in net])
    engine = Engine(own, batch_dim=0)

    def step() -> Tensor:
        losses = F.cross_entropy(own(x), t, reduction="none")
        return engine.compute_gramian(losses).diagonal()

    return {"torchjd, values alone": step}


MISSING: dict[str, str] = {}


def left_out(name: str, why: Exception) -> None:
    """Note a peer that is not there."""
    MISSING[name] = str(why)


CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Step]]]] = {
    "WGAN-GP critic, width 64, B 256": lambda: critics(64, 256),
    "WGAN-GP critic, width 512, B 256": lambda: critics(512, 256),
    "gradient in the inputs, width 512, B 256": lambda: inputs(512, 256),
    "gradient in the weights, width 512, B 64": lambda: weights(512, 64),
    "gradient in the weights, width 1024, B 64": lambda: weights(1024, 64),
    "sharpness and SGD, width 64, B 64": lambda: sharpness(64, 64),
    "sharpness and SGD, width 64, B 256": lambda: sharpness(64, 256),
    "sharpness and SGD, width 512, B 64": lambda: sharpness(512, 64),
    "sharpness and SGD, width 1024, B 64": lambda: sharpness(1024, 64),
    "gradients of samples, width 512, B 64": lambda: samples(512, 64),
    "gradients of samples, width 64, B 256": lambda: samples(64, 256),
}


def agreement(net: nn.Module, steps: dict[str, Step]) -> dict[str, float]:
    """Return how far the gradients of a step are from those by hand, relative to their norm."""
    reference = next((s for name, s in steps.items() if "by hand" in name), None)
    if reference is None:
        return {}
    reference()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()])
    found = {}
    for name, step in steps.items():
        if name == "plain" or step is reference or "alone" in name:
            continue
        step()
        grads = torch.cat([p.grad.flatten() for p in net.parameters()])
        found[name] = float((grads - expected).norm() / expected.norm())
    return found


def run() -> dict[str, Any]:
    """Return the figures of one run."""
    prepare()
    found = {}
    for case, make in CASES.items():
        torch.manual_seed(0)
        net, steps = make()
        torch.manual_seed(0)
        agrees = {} if "WGAN" in case else agreement(net, steps)  # each draws its own points
        gc.collect()
        seconds = times(steps, seconds=SECONDS, slow=SLOW)
        each = {name: ratios(own, seconds["plain"]) for name, own in seconds.items()}
        medians = {name: statistics.median(own) for name, own in each.items()}
        found[case] = {n: [m, agrees.get(n)] for n, m in medians.items() if n != "plain"}
        print(case, found[case], file=sys.stderr)
    return {"cases": found, "missing": MISSING}


def table(runs: list[dict[str, Any]]) -> str:
    """Return the table of several runs."""
    rows = [
        "| case | step | in plain steps | off the gradient by hand |",
        "| --- | --- | --- | --- |",
    ]
    for case, first in runs[0]["cases"].items():
        for name, (_, off) in first.items():
            each = [own["cases"][case][name][0] for own in runs]
            shown = " and ".join(f"{m:.2f}" for m in each)
            rows.append(f"| {case} | {name} | {shown} | {'' if off is None else f'{off:.0e}'} |")
    return "\n".join(rows)


def machine() -> str:
    """Return what the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            s.split(":")[1].strip() for s in info.read_text().splitlines() if "model name" in s
        ]
        cpu = names[0] if names else cpu
    versions = []
    for name in ("torch", "backpack-for-pytorch", "opacus", "torchjd", "pytorch_optimizer"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    versions_of = ", ".join(versions)
    return f"{date.today()}, {cpu}, {os.cpu_count()} cores, one thread;\n{versions_of}"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the figures as bars, one panel a case, in two columns, with both runs as dots."""
    import matplotlib.pyplot as plt

    cases = list(runs[0]["cases"].items())
    half = (len(cases) + 1) // 2
    columns = [cases[:half], cases[half:]]
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    for sub, own in zip(figure.subfigures(1, 2, wspace=0.03), columns, strict=True):
        heights = [len(first) + 1.2 for _, first in own]
        panels = sub.subplots(len(own), 1, height_ratios=heights)
        for panel, (case, first) in zip(panels, own, strict=True):
            bars(panel, case, {name: [r["cases"][case][name][0] for r in runs] for name in first})
        panels[-1].set_xlabel("CPU time in plain steps (the line is at one)", fontsize=8)
    figure.savefig(path, dpi=110)


def bars(panel: Any, case: str, found: dict[str, list[float]]) -> None:
    """Draw the bars of a case."""
    names, each = list(found), list(found.values())
    middle = [statistics.mean(own) for own in each]
    hues = ["tab:blue" if name.startswith("gpkit") else "0.75" for name in names]
    panel.barh(range(len(names)), middle, color=hues)
    for i, own in enumerate(each):
        panel.plot(own, [i] * len(own), ".k", markersize=3)
        panel.text(max(own) * 1.04, i, f"{middle[i]:.3g}", va="center", fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.invert_yaxis()
    panel.set_title(case, fontsize=8, loc="left")
    panel.axvline(1, color="0.5", linewidth=0.8)
    if max(middle) > 20:
        panel.set_xscale("log")
        panel.set_xlim(0.8, max(map(max, each)) * 2.5)
    else:
        panel.set_xlim(0, max(map(max, each)) * 1.15)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="x", labelsize=7)


TEXT = """# Beside peers

`python benchmarks/peers.py`: {machine}.
Steps take turns, CPU time is measured, memory is kept by the process (see timing.py), and each
figure is the median of the ratios to the plain step of the same round. There are two runs, in
processes of their own; both figures are shown. The last column is the relative difference of the
gradients from those of the loop by hand, which finite differences approximate.

![The table as bars](peers.png)

{table}

- "values alone" has no graph: those norms cannot be trained on.
- The loop by hand of a penalty of samples takes a backward pass for each of them.
{missing}"""


def main() -> None:
    """Make two runs, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", action="store_true", help="one run, as JSON")
    if parser.parse_args().run:
        print(json.dumps(run()))
        return
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, __file__, "--run"], stdout=subprocess.PIPE, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    missing = "".join(f"- Left out: {n} ({why}).\n" for n, why in runs[0]["missing"].items())
    text = TEXT.format(machine=machine(), table=table(runs), missing=missing)
    (HERE / "peers.md").write_text(text)
    draw(runs, HERE / "peers.png")


if __name__ == "__main__":
    main()
