"""GANs trained in plain torch, with another run's latents and points. It never imports gpkit."""

import copy
from functools import partial

import torch
import torch.nn.functional as F

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)

LOSSES = {
    "wasserstein": (lambda a, b: b.mean() - a.mean(), lambda a, b: -b.mean()),
    "non_saturating": (
        lambda a, b: F.softplus(-a).mean() + F.softplus(b).mean(),
        lambda a, b: F.softplus(-b).mean(),
    ),
    "minimax": (
        lambda a, b: -torch.sigmoid(a).log().mean() - torch.sigmoid(-b).log().mean(),
        lambda a, b: torch.sigmoid(-b).log().mean(),
    ),
    "hinge": (
        lambda a, b: (1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean(),
        lambda a, b: -b.mean(),
    ),
    "relativistic": (
        lambda a, b: -torch.sigmoid(a - b).log().mean(),
        lambda a, b: -torch.sigmoid(b - a).log().mean(),
    ),
}


def slope(C, x, y):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(C(x, y).sum(), x, create_graph=True)
    return g.square().sum(1)  # [B]


def no_term(C, real, fake, y, points, step):
    return 0.0


def gp_term(C, real, fake, y, points, step):
    point = next(points)
    alpha = (point - fake) / (real - fake)
    torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))  # one for all entries
    assert 0 < alpha.min() < alpha.max() < 1
    return 5.0 * (slope(C, point, y).sqrt() - 1).square().mean()


def r1_term(C, real, fake, y, points, step):
    return 3.0 / 2 * slope(C, real, y).mean()


def lazy_term(C, real, fake, y, points, step):
    return 2 * r1_term(C, real, fake, y, points, step) if step % 2 == 0 else 0.0


def r1_r2_term(C, real, fake, y, points, step):
    return r1_term(C, real, fake, y, points, step) + 1.0 / 2 * slope(C, fake, y).mean()


def weight_term(C, real, fake, y, points, step):
    loss = LOSSES["non_saturating"][0](C(real, y), C(fake, y))
    grads = torch.autograd.grad(loss, list(C.parameters()), create_graph=True)
    return 0.1 * sum(g.square().sum() for g in grads)


def take(optimizer, params, total):
    """Step all parameters; those that the total does not reach have a gradient of zero."""
    grads = torch.autograd.grad(total, params, allow_unused=True)
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.zeros_like(p) if g is None else g
    optimizer.step()


def train(
    G,
    C,
    epochs,
    seen,
    term,
    loss="non_saturating",
    accumulate=1,
    critic_steps=2,
    simultaneous=False,
    clip=None,
    gradient_clip=None,
    ema=None,
    decay=1.0,
    apart=False,
    decay_each_epoch=1.0,
):
    """Train copies of the nets; return them and the average of the generator.

    Args:
        epochs: the batches (x, y) of each epoch; y may be None.
        seen: the latents, and the points of a penalty, in the order of the steps.
        term: ``(C, real, fake, y, points, step) -> penalty``.
        decay: the factor of both learning rates after each step.
        decay_each_epoch: after each epoch.
        apart: the penalty has an optimiser step of its own.
    """
    G, C = copy.deepcopy(G), copy.deepcopy(C)
    average = copy.deepcopy(G)
    of_critic, of_generator = LOSSES[loss]
    oC, oG = SGD(C.parameters()), SGD(G.parameters())
    latents, points = seen
    latents, points = iter(latents), iter(points)
    step = 0
    for batches in epochs:
        for i in range(0, len(batches), accumulate):
            window = batches[i : i + accumulate]

            def critic_gradient(window=window, step=step, only=""):
                oC.zero_grad()
                for x, y in window:
                    on_real = only == "penalty" and term in (r1_term, lazy_term)
                    fake = None if on_real else G(next(latents), y).detach()
                    total = 0.0 if only == "penalty" else of_critic(C(x, y), C(fake, y))
                    total = total + (0 if only == "loss" else term(C, x, fake, y, points, step))
                    if torch.is_tensor(total):
                        (total / len(window)).backward()

            def generator_gradient(window=window):
                oG.zero_grad()
                for x, y in window:
                    total = of_generator(C(x, y), C(G(next(latents), y), y)) / len(window)
                    params = list(G.parameters())
                    grads = torch.autograd.grad(total, params, allow_unused=True)
                    for p, g in zip(params, grads, strict=True):
                        p.grad = g if p.grad is None else p.grad + g

            def take(optimizer, net):
                if gradient_clip:
                    reached = [p for p in net.parameters() if p.grad is not None]
                    norm = sum(p.grad.square().sum() for p in reached).sqrt()
                    for p in reached:
                        p.grad *= min(1.0, gradient_clip / (norm + 1e-6))
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= decay
                if clip and net is C:
                    for p in C.parameters():
                        p.data = p.data.clamp(-clip, clip)

            step += 1
            turn = step % critic_steps == 0
            critic_gradient(only="loss" if apart else "")
            if simultaneous and turn:
                generator_gradient()
            take(oC, C)
            if apart:
                critic_gradient(only="penalty")
                if any(p.grad is not None for p in C.parameters()):
                    for p in C.parameters():  # the last bias, which R1 does not reach
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    take(oC, C)
            if turn:
                if not simultaneous:
                    generator_gradient()
                take(oG, G)
                if ema is not None:
                    for a, p in zip(average.parameters(), G.parameters(), strict=True):
                        a.data = ema * a.data + (1 - ema) * p.data
                    for a, b in zip(average.buffers(), G.buffers(), strict=True):
                        a.copy_(b)
        for group in (*oC.param_groups, *oG.param_groups):
            group["lr"] *= decay_each_epoch
    return G, C, average


def interpolates(seen, x):
    """Return what a critic saw after real and fake samples; ``x`` holds all real ones."""
    rows = set(map(tuple, x.tolist()))
    after = zip(seen, seen[2:], strict=False)
    return [point for real, point in after if tuple(real[0].tolist()) in rows]
