"""Nets and losses whose weight penalties are compared with a loop by hand."""

import torch
from torch import nn
from torch.nn import functional as F

import gpkit


class Tokens(nn.Module):
    """Embedding, norm and linear layers on sequences; one of them runs twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        h = torch.tanh(self.mix(self.norm(self.embedding(x))))
        return self.head(torch.tanh(self.mix(h)).mean(1))


def wide():
    """Return a net in which Gram matrices pay at batches up to some 60."""
    return nn.Sequential(
        nn.Linear(5, 90), nn.SiLU(), nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 3)
    )


def softsign():
    """Return the same with a function that has no rule, so its graph is differentiated twice."""
    return nn.Sequential(
        nn.Linear(5, 90), nn.Softsign(), nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 3)
    )


def images():
    return nn.Sequential(
        *[nn.Conv2d(2, 4, 3, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 2), nn.Tanh()],
        *[nn.Flatten(), nn.BatchNorm1d(4).eval(), nn.Linear(4, 3)],
    )


CASES = {
    "wide": (wide, lambda b: torch.randn(b, 5)),
    "softsign": (softsign, lambda b: torch.randn(b, 5)),
    "images": (images, lambda b: torch.randn(b, 2, 6, 6)),
    "tokens": (Tokens, lambda b: torch.randint(7, (b, 4))),
}
SCOPES = {
    "batch": (gpkit.weight_grad_norm, "mean"),
    "sample": (gpkit.per_sample_grad_norm, "none"),
}


def built(name):
    torch.manual_seed(0)
    make, samples = CASES[name]
    net = make().double()

    def batch(size):
        x = samples(size)
        return (x.double() if x.is_floating_point() else x), torch.randint(3, (size,))

    return net, batch


def by_hand(net, x, t, scope, form=lambda n2: n2, weight=0.3):
    """Return loss and penalty, and their gradients, from a gradient for each loss."""
    params = [p for p in net.parameters() if p.requires_grad]
    losses = F.cross_entropy(net(x), t, reduction="none")
    every = losses.unbind() if scope == "sample" else [losses.mean()]
    n2 = []
    for y in every:
        grads = torch.autograd.grad(y, params, create_graph=True, allow_unused=True)
        n2.append(sum(g.square().sum() for g in grads if g is not None))
    total = losses.mean() + weight * form(torch.stack(n2)).mean()
    return total.detach(), torch.autograd.grad(total, params, allow_unused=True)


def loss_of(net, x, t, scope):
    """Return a closure, made anew at each step as in a loop over batches."""
    return lambda: F.cross_entropy(net(x), t, reduction=SCOPES[scope][1])


def require_right(penalty, net, x, t, scope, **by):
    for p in net.parameters():
        p.grad = None
    total = penalty.with_loss(loss_of(net, x, t, scope), net)
    total.backward()
    expected, grads = by_hand(net, x, t, scope, **by)
    torch.testing.assert_close(total.detach(), expected, rtol=1e-10, atol=0)
    found = [p.grad for p in net.parameters() if p.requires_grad]
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
