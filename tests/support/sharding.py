"""Nets, penalties and data for two processes with FSDP2, and the difference quotient by hand."""

from functools import partial

import ranks
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gpkit

B, STEPS, H, RATE = 8, 4, 0.01, 0.5

SGD, ADAM = partial(torch.optim.SGD, lr=0.05, momentum=0.9), partial(torch.optim.Adam, lr=0.01)

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def smooth(dtype=torch.float64):
    """Odd sizes, so that shards differ in size, and a single number, so that one is empty."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)
    return nn.Sequential(*layers).to(dtype)


def single():
    return smooth(torch.float32)


def frozen():
    net = smooth()
    net[2].requires_grad_(False)
    return net


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


def pair(weight=0.1, match="*", norm="l2", c=None, step=H, side="forward", every=1, target=None):
    """A penalty, and what the loop by hand needs to know of it; c is the centre, None for n²."""
    penalty = gpkit.GradientPenalty(
        of="loss",
        wrt=gpkit.weights(match),
        scope="global",
        form=gpkit.squared(norm=norm) if c is None else gpkit.two_sided(c, norm=norm),
        estimator=gpkit.finite_difference(step, side=side),
        weight=gpkit.target_norm(target, weight=weight, rate=RATE) if target else weight,
        every=every,
    )
    return penalty, (weight, match.rstrip("*"), norm, c or 0.0, step, side, every, target)


def data(dtype):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * B, 5, generator=rng, dtype=torch.float64).to(dtype)
    return x, x[:, :1] ** 2


def batches(dtype):
    return list(zip(*(t.split(B) for t in data(dtype)), strict=True))


def halves(batch):
    size = B // ranks.RANKS
    return [[t[rank * size :][:size] for t in batch] for rank in range(ranks.RANKS)]


def sharded(net, reshard_after_backward=True, **options):
    """Shard every layer that has weights, and the whole; tied weights need to be in one group."""
    if "mesh" in options:
        options["mesh"] = init_device_mesh("cpu", options["mesh"], mesh_dim_names=("copy", "shard"))
    layers = [] if isinstance(net, Tied) else [m for m in net.children() if list(m.parameters())]
    for module in [*layers, net]:
        fully_shard(module, **options)
    net.set_reshard_after_backward(reshard_after_backward)
    return net


def whole(net):
    """The values of a net whose shards lie on both processes."""
    values = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    full = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in values.items()}
    return {n: v.detach().clone() for n, v in full.items()}


def slope(base, params, chosen, again, norm, h, side, compute):
    """∇n ≈ (∇L(θ + hv) - ∇L(θ)) / h for n = ‖∇L‖ of the chosen weights, and n."""
    flat = torch.cat([g.reshape(-1) for g, c in zip(base, chosen, strict=True) if c])
    moved = [p for p, c in zip(params, chosen, strict=True) if c]
    n = flat.norm(p={"l1": 1, "l2": 2, "linf": torch.inf}[norm])
    v = {"l1": flat.sign(), "l2": flat / n, "linf": flat.sign() * (flat.abs() == n)}[norm]
    if h is None:
        size = torch.cat([p.detach().reshape(-1) for p in moved]).square().mean().sqrt().item()
        eps = torch.finfo(compute).eps
        h = (eps ** (1 / 3) / 2 if side == "central" else 2 * eps**0.5) * max(1.0, size)
    h = h / v.norm()

    def at(sign):
        kept = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p, part in zip(moved, v.split([p.numel() for p in moved]), strict=True):
                p += sign * h * part.reshape(p.shape)
        grads = again()
        with torch.no_grad():
            for p, old in zip(moved, kept, strict=True):
                p.copy_(old)
        return grads

    low = base if side == "forward" else at(-1)
    high = base if side == "backward" else at(1)
    width = 2 * h if side == "central" else h
    return [(b - a) / width for a, b in zip(low, high, strict=True)], n
