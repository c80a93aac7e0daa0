"""Penalties as they are written by hand: right ones, and those with a bug from public code."""

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn import functional as F


def between(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return (alpha * real + (1 - alpha) * fake).detach().requires_grad_()


def per_sample(x: Tensor) -> Tensor:
    return torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)


def slope(critic, x: Tensor, create_graph: bool = True) -> Tensor:
    return grad(critic(x).sum(), x, create_graph=create_graph)[0]


# right


def wgan_gp(critic, real, fake):
    g = slope(critic, between(real, fake, per_sample(real)))
    return 10 * ((g.flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def r1(critic, real):
    g = slope(critic, real.detach().requires_grad_())
    return 0.5 * g.square().flatten(1).sum(1).mean()


def dragan(critic, real):
    noise = 0.5 * real.std(correction=0) * (2 * torch.rand_like(real) - 1)
    x = (real + per_sample(real) * noise).detach().requires_grad_()
    g = slope(critic, x)
    return 10 * ((g.flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def laplacian(net, x):
    x = x.detach().requires_grad_()
    g = slope(net, x)
    seconds = [grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(seconds).sum(0).abs().mean()


def laplacian_func(net, x):
    params = dict(net.named_parameters())
    H = vmap(hessian(lambda z: functional_call(net, params, (z[None],)).squeeze()))(x)
    return H.diagonal(dim1=1, dim2=2).sum(1).abs().mean()


def jacobian(net, x):
    x = x.detach().requires_grad_()
    rows = [grad(y.sum(), x, create_graph=True)[0] for y in net(x).unbind(1)]
    return 0.5 * torch.stack(rows, 1).flatten(1).square().sum(1).mean()


def jacobian_func(net, x):
    params = dict(net.named_parameters())
    J = vmap(jacrev(lambda z: functional_call(net, params, (z[None],))[0]))(x)
    return 0.5 * J.flatten(1).square().sum(1).mean()


def jacobian_projected(net, x):
    x = x.detach().requires_grad_()
    y = net(x)
    v = torch.randn_like(y)
    v = v / v.norm(dim=1, keepdim=True) * y.shape[1] ** 0.5
    (g,) = grad((y * v).sum(), x, create_graph=True)
    return 0.5 * g.flatten(1).square().sum(1).mean()


def weight_grad_norm(net, x, y):
    grads = grad(F.cross_entropy(net(x), y), list(net.parameters()), create_graph=True)
    return sum(g.square().sum() for g in grads)


# wrong


def norm_over_channels(critic, real, fake):
    g = slope(critic, between(real, fake, per_sample(real)))
    return 10 * ((g.square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def one_alpha_for_the_batch(critic, real, fake):
    g = slope(critic, between(real, fake, torch.rand(1, dtype=real.dtype)))
    return 10 * ((g.flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def one_alpha_an_entry(critic, real, fake):
    g = slope(critic, between(real, fake, torch.rand_like(real)))
    return 10 * ((g.flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def norm_of_the_batch(critic, real, fake):
    g = slope(critic, between(real, fake, per_sample(real)))
    return 10 * ((g.square().sum() + 1e-12).sqrt() - 1).square()


def root_of_zero(critic, real, fake):
    g = slope(critic, between(real, fake, per_sample(real)))
    return 10 * (g.flatten(1).square().sum(1).sqrt() - 1).square().mean()


def no_create_graph(critic, real, fake):
    g = slope(critic, between(real, fake, per_sample(real)), create_graph=False)
    return 10 * ((g.flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def half_a_graph(critic, real):
    """The penalty of a sum, of which one part has a graph."""
    x = real.detach().requires_grad_()
    g, kept = slope(critic, x), slope(critic, x, create_graph=False)
    return (g * kept).flatten(1).sum(1).mean()


def clean_instead_of_noised(critic, real):
    noise = 0.5 * real.std(correction=0) * (2 * torch.rand_like(real) - 1)
    _noised = (real + per_sample(real) * noise).requires_grad_()
    x = real.detach().requires_grad_()
    g = slope(critic, x)
    return 10 * ((g.flatten(1).square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def r1_of_clean(critic, real, noised):
    return r1(critic, real)


def r1_of_noised(critic, real, noised):
    return r1(critic, noised)


def row_sums_of_the_hessian(net, x):
    x = x.detach().requires_grad_()
    seconds = grad(slope(net, x).sum(), x, create_graph=True)[0]
    return seconds.sum(1).abs().mean()


def mean_loss(net, x, y):
    x = x.detach().requires_grad_()
    (g,) = grad(F.cross_entropy(net(x), y), x, create_graph=True)
    return g.flatten(1).square().sum(1).mean()


def sum_of_losses(net, x, y):
    x = x.detach().requires_grad_()
    (g,) = grad(F.cross_entropy(net(x), y, reduction="sum"), x, create_graph=True)
    return g.flatten(1).square().sum(1).mean()


def scaled_inner_gradient(critic, real):
    """R1 with the inner gradient scaled, as the AMP recipe has it."""
    x = real.detach().requires_grad_()
    g = grad(critic(x).sum() * 2.0**14, x, create_graph=True)[0].float() / 2.0**14
    return 0.5 * g.square().flatten(1).sum(1).mean()


def outside_of_autocast(critic, real):
    with torch.autocast(real.device.type, enabled=False):
        return r1(critic, real)
