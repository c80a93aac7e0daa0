"""Steps of with_loss by finite differences that repeat earlier ones, and the same by hand."""

import torch
from differenced import fd

import gpkit

PENALTIES = {  # the penalty, and the form of n whose gradient is added
    "squared": (lambda: gpkit.weight_grad_norm(0.3, estimator=fd(1e-5, "central")), lambda n: n**2),
    "default step": (lambda: gpkit.weight_grad_norm(0.3, estimator=fd()), lambda n: n**2),
    "backward": (
        lambda: gpkit.weight_grad_norm(0.3, estimator=fd(1e-6, "backward")),
        lambda n: n**2,
    ),
    "norm": (lambda: gpkit.weight_grad_norm(0.3, form="norm", estimator=fd(1e-6)), lambda n: n),
    "two-sided": (
        lambda: gpkit.weight_grad_norm(0.3, form=gpkit.two_sided(0.4), estimator=fd(1e-6)),
        lambda n: (n - 0.4) ** 2,
    ),
}


def closure_of(net, x):
    """Return a closure, made anew at each step as in a loop over batches."""
    return lambda: net(x).square().mean()


def by_hand(net, loss, form, weight=0.3):
    """Return a loss and a penalty by double backward, and the gradients of both."""
    params = [p for p in net.parameters() if p.requires_grad]
    n = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)]
    ).norm()
    total = loss + weight * form(n)
    return total.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(total, params)])


def loss_of(net, x):
    """Return the loss of a net."""
    return net(x).square().mean()
