"""Penalties of a generator, in w where it has a mapping; StyleGAN2's training loop."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gan_by_hand import slope, take
from gans import B, Witness, assert_same, critic, data, module, trainer
from torch import nn
from torch.utils.data import DataLoader

import gpkit
from gpkit.estimators import gaussian_product
from gpkit.lightning.gan.latents import Path, parts_of


class Styled(nn.Module):
    """z -> w -> x, with StyleGAN2's names."""

    def __init__(self):
        super().__init__()
        self.mapping = Witness(nn.Linear(3, 4), nn.Tanh())
        self.synthesis = Witness(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, z):
        return self.synthesis(self.mapping(z))


def test_trains_as_stylegan2_does(monkeypatch):
    noise = []

    def drawn(*args):
        noise.append(torch.randn(args[1], dtype=args[3]))
        return noise[-1]

    monkeypatch.setattr(gaussian_product_module(), "normal", drawn)
    G, C = Styled(), critic()
    true_G, true_C = copy.deepcopy(G), copy.deepcopy(C)
    adam = partial(torch.optim.Adam, **gpkit.lazy_adam(0.01, (0.5, 0.9), 2))
    made = module(
        G,
        C,
        loss="non_saturating",
        penalty=gpkit.r1(3.0, every=2),
        generator_penalty=gpkit.path_length(2.0, every=2),
        generator_penalty_shrink=2,
        critic_optimizer=adam,
        generator_optimizer=adam,
        critic_steps=1,
        penalty_steps=True,
        generator_first=True,
    )
    trainer().fit(made, DataLoader(data(), B))
    r, average = 2 / 3, 0.0
    latents, noise = iter(G.mapping.seen), iter(noise)
    of_G, of_C = list(true_G.parameters()), list(true_C.parameters())
    oG, oC = (torch.optim.Adam(p, lr=r * 0.01, betas=(0.5**r, 0.9**r)) for p in (of_G, of_C))
    for step, (x, _) in enumerate([*DataLoader(data(), B)] * 2):
        take(oG, of_G, F.softplus(-true_C(true_G(next(latents)))).mean())
        if step % 2 == 0:
            z = next(latents)
            assert len(z) == B // 2
            w = true_G.mapping(z)
            image = (true_G.synthesis(w) * next(noise)).sum()
            (g,) = torch.autograd.grad(image, w, create_graph=True)
            lengths = g.square().sum(1).sqrt()
            new = average + 0.01 * (lengths.mean() - average)
            average = new.detach()
            take(oG, of_G, 2 * 2 * (lengths - new).square().mean())
        fake = true_G(next(latents)).detach()
        take(oC, of_C, F.softplus(-true_C(x)).mean() + F.softplus(true_C(fake)).mean())
        if step % 2 == 0:
            take(oC, of_C, 2 * 3 / 2 * slope(true_C, x, None).mean())
    assert next(latents, None) is None  # R1 made no fakes
    assert_same(made.generator, true_G)
    assert_same(made.critic, true_C)


def gaussian_product_module():
    import sys

    return sys.modules[gaussian_product.__module__]


class Bent(nn.Module):
    """w = tanh(m z) and x = s w² / 2."""

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.s = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def style(self, z):
        return (self.m * z).tanh()

    def draw(self, w):
        return self.s * w.square() / 2

    def forward(self, z):
        return self.draw(self.style(z))


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
@pytest.mark.parametrize("forward", ["isolated", "training", "eval"])
def test_a_generators_penalty_is_in_w_and_trains_the_mapping(forward, estimator):
    G = Bent()
    z = torch.tensor([[0.3], [-1.1], [2.0]], dtype=torch.float64)
    penalty = gpkit.input_grad_norm(2.0, of="output", forward=forward, estimator=estimator)
    w = (G.m * z).tanh()
    in_w = 2 * (G.s * w).square().mean()
    in_z = 2 * (G.s * w * (1 - w.square()) * G.m).square().mean()
    for mapping, true in ((("style", "draw"), in_w), (None, in_z)):
        terms = Path(G, parts_of(G, mapping)).act(penalty, z, None, 0)
        torch.testing.assert_close(terms.penalty, true, rtol=1e-4, atol=0)
        found = torch.autograd.grad(terms.penalty, [G.m, G.s])
        expected = torch.autograd.grad(true, [G.m, G.s], retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert penalty.at.detach


def test_a_penalty_in_w_leaves_no_trace_in_the_mapping():
    G = Styled()
    G.mapping.layers.append(nn.BatchNorm1d(4).double())
    before = copy.deepcopy(dict(G.named_buffers()))
    z = torch.randn(6, 3, dtype=torch.float64)
    for forward, moves in (("isolated", False), ("training", True)):
        penalty = gpkit.path_length(every=1, forward=forward)
        Path(G, parts_of(G, "auto")).act(penalty, z, None, 0)
        same = [torch.equal(b, before[name]) for name, b in G.named_buffers()]
        assert all(same) is not moves
