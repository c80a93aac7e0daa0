"""Penalised training loops written out in plain torch. It never imports gpkit.

One process plays all ranks: each micro-batch of each rank has a loss and a penalty of its own, and
their gradients are averaged, as data parallelism and accumulation average them.
"""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F

STEP = 0.05  # of finite differences
SCALE = 2.0**10  # of gradient scalers at the start: of a size that does not skip every step


def gradient(y, xs, scale, **options):
    """The recipe of automatic mixed precision: scale, differentiate, unscale in float32."""
    with torch.autocast("cpu", enabled=False):
        grads = torch.autograd.grad(y * scale, xs, **options)
        return [None if g is None else g.to(wide(g)) / scale for g in grads]


def wide(t):
    return torch.promote_types(t.dtype, torch.float32)


def squares(grads):
    return sum(g.square().sum() for g in grads)


def linear(params, slopes):
    """A function whose gradient in the parameters is known."""
    pairs = zip(params, slopes, strict=True)
    return sum((p * s).sum() for p, s in pairs if s is not None)


def weight_exact(net, x, y, weight, scale):
    loss = F.cross_entropy(net(x), y)
    grads = gradient(loss, list(net.parameters()), scale, create_graph=True)
    return loss + weight * squares(grads)


def weight_difference(net, x, y, weight, scale):
    """∇P = 2λ‖∇L‖ (∇L(θ + hv) - ∇L(θ)) / h, v = ∇L / ‖∇L‖."""
    params = list(net.parameters())
    loss = F.cross_entropy(net(x), y)
    here = gradient(loss, params, scale, retain_graph=True)
    length = squares(here).sqrt()
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for p, g in zip(moved.parameters(), here, strict=True):
            p += STEP * g / length
    there = gradient(F.cross_entropy(moved(x), y), list(moved.parameters()), scale)
    slopes = [2 * length * (b - a) / STEP for a, b in zip(here, there, strict=True)]
    return loss + weight * linear(params, slopes)


def sample_norms(loss, z, scale):
    """mean ‖∂BL/∂z_i‖², of the mean loss L rescaled by B."""
    (g,) = gradient(len(z) * loss, [z], scale, create_graph=True)
    return g.flatten(1).square().sum(1).mean()


def input_exact(net, x, y, weight, scale):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(net(x), y)
    return loss + weight * sample_norms(loss, x, scale)


def activation_exact(net, x, y, weight, scale):
    h = net.backbone(x)
    loss = F.cross_entropy(net.head(h), y)
    return loss + weight * sample_norms(loss, h, scale)


def mean_difference(loss_at, zero, params, weight, scale):
    """∇P = λ (∇BL(z + tw) - ∇BL(z)) / t, L the mean loss, w_i = (2/B) ∂BL/∂z_i."""
    batch = len(zero)
    o = zero.requires_grad_()
    (g,) = gradient(batch * loss_at(o), [o], scale)
    w = 2 / batch * g
    t = STEP / w.flatten(1).norm(dim=1).max()
    ends = (torch.zeros_like(zero), (t * w).to(zero.dtype))
    here, there = (gradient(batch * loss_at(end), params, scale, allow_unused=True) for end in ends)
    slopes = [None if a is None else (b - a) / t for a, b in zip(here, there, strict=True)]
    return weight * linear(params, slopes)


def input_difference(net, x, y, weight, scale):
    def loss_at(offset):
        return F.cross_entropy(net(x + offset), y)

    args = list(net.parameters()), weight, scale
    return F.cross_entropy(net(x), y) + mean_difference(loss_at, torch.zeros_like(x), *args)


def activation_difference(net, x, y, weight, scale):
    def loss_at(offset):
        return F.cross_entropy(net.head(net.backbone(x) + offset), y)

    args = list(net.parameters()), weight, scale
    zero = torch.zeros_like(net.backbone(x).detach())
    return F.cross_entropy(net(x), y) + mean_difference(loss_at, zero, *args)


TOTALS = {
    ("weight", "exact"): weight_exact,
    ("weight", "difference"): weight_difference,
    ("input", "exact"): input_exact,
    ("input", "difference"): input_difference,
    ("activation", "exact"): activation_exact,
    ("activation", "difference"): activation_difference,
}


def train(
    net,
    batches,
    total,
    weight,
    optimizer,
    *,
    precision="32",
    windows,
    clip=None,
    look=None,
    divide=None,
):
    """Train, and return the net.

    Args:
        net: has a backbone and a head.
        batches: for each micro-batch, the (x, y) of every rank.
        total: ``(net, x, y, weight, scale) -> loss with penalty``.
        weight: λ, or a function of the optimiser step.
        optimizer: parameters -> optimiser.
        precision: "32", "bf16", "16" or "64".
        windows: for each optimiser step, how many micro-batches are accumulated.
        clip: the largest norm of the gradient.
        divide: what each loss is divided by, if not by the micro-batches of its step.
        look: called with (net, x, y) when the gradient of a step is there, before it is clipped.
    """
    net = copy.deepcopy(net)
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == "16")
    optimizer = optimizer(net.parameters())
    batches = iter(batches)
    for step, size in enumerate(windows):
        now = weight(step) if callable(weight) else weight
        optimizer.zero_grad()
        for _ in range(size):
            ranks = next(batches)
            for x, y in ranks:
                scale = scaler.scale(torch.ones(())) if precision == "16" else 1.0
                with torch.autocast("cpu", half) if half else nullcontext():
                    value = total(net, x, y, now, scale)
                scaler.scale(value / (divide or size) / len(ranks)).backward()
        scaler.unscale_(optimizer)
        if look is not None:
            look(net, x, y)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return net
