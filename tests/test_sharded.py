"""Two processes with FSDP2: as one process with the whole batch, by a loop written by hand."""

import copy
import os
import socket
from contextlib import nullcontext
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gpkit
from gpkit.isolation import random_state
from gpkit.lightning.sharded import ShardedWeights, is_sharded, refusals
from gpkit.variables import Computed

B, RANKS, STEPS, H = 8, 2, 4, 0.01
SGD, ADAM = partial(torch.optim.SGD, lr=0.05, momentum=0.9), partial(torch.optim.Adam, lr=0.01)


def smooth(dtype=torch.float64):
    """Odd sizes, so that shards differ in size, and one of a single number, so that one is empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def frozen():
    net = smooth()
    net[2].requires_grad_(False)
    return net


def noisy():
    """Batch norm and dropout: what a second forward must not disturb, and must repeat."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 1)
    ).double()


def batches(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, B, 5, generator=rng, dtype=torch.float64).to(dtype)
    return list(zip(x, x[..., :1] ** 2, strict=True))


def half(batch, rank):
    return [t[rank * B // RANKS : (rank + 1) * B // RANKS] for t in batch]


def pair(weight=0.1, match="*", norm="l2", c=None, step=H, side="forward", every=1):
    """A penalty, and what the loop by hand needs to know of it; c is the centre, None for n²."""
    form = gpkit.squared(norm=norm) if c is None else gpkit.two_sided(c, norm=norm)
    penalty = gpkit.GradientPenalty(
        of="loss",
        wrt=gpkit.weights(match),
        form=form,
        estimator=gpkit.finite_difference(step, side=side),
        weight=weight,
        every=every,
    )
    return penalty, (weight, match.rstrip("*"), norm, c or 0.0, step, side, every)


SINGLE, BATCH_NORM = partial(smooth, torch.float32), noisy
# name: net, penalties, optimiser, keywords of fully_shard
CASES = {
    "SGD": (smooth, [pair()], SGD, {}),
    "Adam": (smooth, [pair()], ADAM, {}),
    "float32, SGD": (SINGLE, [pair()], SGD, {}),
    "float32, Adam": (SINGLE, [pair()], ADAM, {}),
    "default step": (smooth, [pair(step=None)], SGD, {}),
    "default step, central": (smooth, [pair(step=None, side="central")], SGD, {}),
    "backward": (smooth, [pair(side="backward")], SGD, {}),
    "central": (smooth, [pair(side="central")], SGD, {}),
    "two-sided": (smooth, [pair(c=0.5)], SGD, {}),
    "l1": (smooth, [pair(norm="l1", weight=0.01)], SGD, {}),
    "linf": (smooth, [pair(norm="linf")], SGD, {}),
    "some weights": (smooth, [pair(match="2.*")], SGD, {}),
    "two penalties": (smooth, [pair(), pair(0.3, match="0.*", c=0.2)], SGD, {}),
    "every second step": (smooth, [pair(every=2)], SGD, {}),
    "tied": (Tied, [pair()], SGD, {}),
    "frozen": (frozen, [pair()], SGD, {}),
    "gathered until the backward": (smooth, [pair()], SGD, {"reshard_after_forward": False}),
    "batch norm and dropout": (noisy, [pair()], SGD, {}),
}
PASSES = {"central": 3, "default step, central": 3, "two penalties": 3, "every second step": None}


def sharded(net, **options):
    """Shard every layer, and the rest with the whole."""
    for module in [] if isinstance(net, Tied) else net.children():  # tied weights: one group
        if any(True for _ in module.parameters()):
            fully_shard(module, **options)
    return fully_shard(net, **options)


def whole(net):
    """The values of a net whose shards lie on both processes."""
    values = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    full = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in values.items()}
    return {n: v.detach().clone() for n, v in full.items()}


def train(name, rank):
    """Train a net of two layers or more on two processes, in a plain loop; return what it became."""
    make, pairs, optimizer, options = copy.deepcopy(CASES[name])
    net = make()
    dtype = next(net.parameters()).dtype
    sharded(net, **options)
    penalties = {str(i): penalty for i, (penalty, _) in enumerate(pairs)}
    optimizer = optimizer([p for p in net.parameters() if p.requires_grad])
    sharded_weights, calls, logged = ShardedWeights(net), [], []
    net.register_forward_hook(lambda *_: calls.append("forward"))
    torch.manual_seed(rank)  # of dropout
    for step, batch in enumerate(batches(dtype)):
        x, y = half(batch, rank)
        before = random_state(x.device)

        def loss(x=x, y=y):
            value = F.mse_loss(net(x), y)
            value.register_hook(lambda _: calls.append("backward"))
            return value

        optimizer.zero_grad()
        given = Computed(loss(), loss, before)
        total, terms = sharded_weights.terms(penalties, given, step)
        acting = [t for t in terms.values() if t is not None]
        logged.append([float(t.penalty.detach()) for t in acting])
        total = total + sum(t.penalty for t in acting)
        total.backward()
        optimizer.step()
    return {"net": whole(net), "calls": calls, "logged": logged}


def lengths(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).norm()


def by_hand(name):
    """Train the same net on one process: torch.autograd and the formula, no more."""
    make, pairs, optimizer, _ = CASES[name]
    net = make()
    dtype = next(net.parameters()).dtype
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    optimizer = optimizer(named.values())
    streams = [torch.Generator().manual_seed(r).get_state() for r in range(RANKS)]
    buffers = [copy.deepcopy(dict(net.named_buffers())) for _ in range(RANKS)]
    logged = []

    def gradients(batch, keep=False):
        """The mean over the halves, each with its own random numbers and batch statistics."""
        total = [torch.zeros_like(p) for p in named.values()]
        for rank in range(RANKS):
            x, y = half(batch, rank)
            torch.set_rng_state(streams[rank])
            mine = copy.deepcopy(buffers[rank])
            values = {**dict(net.named_parameters()), **mine}
            loss = F.mse_loss(torch.func.functional_call(net, values, (x,)), y)
            for t, g in zip(total, torch.autograd.grad(loss, named.values()), strict=True):
                t += g / RANKS
            if keep:
                new = torch.get_rng_state()
                kept.append((new, mine))
        return total

    for step, batch in enumerate(batches(dtype)):
        kept = []
        total = base = gradients(batch, keep=True)
        logged.append([])
        for _, (weight, prefix, norm, c, h, side, every) in pairs:
            if step % every:
                continue
            total, value = penalised(
                total, base, named, lambda b=batch: gradients(b), prefix, norm, c, h, side,
                weight * every,
            )
            logged[-1].append(float(value))
        streams, buffers = map(list, zip(*kept, strict=True))
        for p, g in zip(named.values(), total, strict=True):
            p.grad = g
        optimizer.step()
    return {**{n: p.detach() for n, p in net.named_parameters()}, **buffers[0]}, logged


def penalised(total, base, named, gradients, prefix, norm, c, h, side, weight):
    """The gradient with a penalty (n - c)², whose slope in n is 2 (n - c), and its value."""
    moved = [n.startswith(prefix) for n in named]
    params = [p for p, m in zip(named.values(), moved, strict=True) if m]
    flat = torch.cat([g.reshape(-1) for g, m in zip(base, moved, strict=True) if m])
    n = flat.norm(p={"l1": 1, "l2": 2, "linf": torch.inf}[norm])
    if norm == "l2":
        v = flat / n
    else:
        v = flat.sign() if norm == "l1" else flat.sign() * (flat.abs() == n)
    if h is None:
        eps = torch.finfo(flat.dtype).eps
        h = eps ** (1 / 3) / 2 if side == "central" else 2 * eps**0.5
        h = h * max(1.0, float(torch.cat([p.detach().reshape(-1) for p in params]).square().mean() ** 0.5))
    h = h / v.norm()
    v = [part.reshape(p.shape) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]

    def at(sign):
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, part in zip(params, v, strict=True):
                p += sign * h * part
        moved = gradients()
        with torch.no_grad():
            for p, old in zip(params, kept, strict=True):
                p.copy_(old)
        return moved

    low = {"forward": base}.get(side) or at(-1)
    high = {"backward": base}.get(side) or at(1)
    width = 2 * h if side == "central" else h
    slopes = [(b - a) / width * 2 * (n - c) for a, b in zip(low, high, strict=True)]
    return [t + weight * s for t, s in zip(total, slopes, strict=True)], weight * (n - c) ** 2


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results = {name: train(name, rank) for name in CASES}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process knows at the end."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process(ranks, name):
    true, logged = by_hand(name)
    dtype = next(iter(true.values())).dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-6 if "default" in name else 1e-11
    for known in ranks:
        for n, value in known[name]["net"].items():
            if "running" in n or "num_batches" in n:
                continue
            print(name, n, (value - true[n]).abs().max().item())
            torch.testing.assert_close(value, true[n], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(known[name]["logged"], logged, rtol=tolerance, atol=tolerance)
