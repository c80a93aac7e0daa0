"""GANs on dicts: penalties in named entries, with what they need of the batch; against torch."""

from functools import partial

import pytest
import torch
from gans import Seen, trainer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader

import gpkit
from gpkit.lightning.gan import GANModule

B, RATE = 5, 0.05
RNG = torch.Generator().manual_seed(0)
draw = partial(torch.randn, generator=RNG, dtype=torch.float64)
BATCH = {
    "image": draw(B, 1, 3, 3) * torch.linspace(0.3, 2, B).reshape(B, 1, 1, 1),
    "table": draw(B, 2),
    "kind": torch.tensor([0, 2, 1, 1, 0]),
    "mask": (draw(B, 1, 3, 3) > 0).double(),
    "w": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64),
}
KEYS = ("image", "table")
SGD = partial(torch.optim.SGD, lr=RATE)


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.table, self.kind = nn.Conv2d(1, 2, 2), nn.Linear(2, 3), nn.Embedding(3, 2)
        self.head, self.seen = nn.Linear(13, 1), Seen()
        self.double()

    def forward(self, image, table, kind):
        if self.training:
            self.seen.append({"image": image.detach(), "table": table.detach()})
        h = [self.image(image).flatten(1), self.table(table), self.kind(kind)]
        return self.head(torch.tanh(torch.cat(h, 1))).squeeze(1)


class OfADict(Critic):
    def forward(self, samples):
        return super().forward(*[samples[key] for key in (*KEYS, "kind")])


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Linear(3, 11).double()

    def forward(self, z):
        x = self.layers(z)
        return {"image": x[:, :9].reshape(-1, 1, 3, 3), "table": x[:, 9:]}


PLAIN = Critic().eval()


def score(params, x):
    return functional_call(PLAIN, params, (x["image"], x["table"], BATCH["kind"]))


def n2(params, x, keys, metric=1.0):
    def one(varied, fixed, kind):
        x = {k: v.unsqueeze(0) for k, v in {**fixed, **varied}.items()}
        return functional_call(PLAIN, params, (x["image"], x["table"], kind.unsqueeze(0)))[0]

    varied = {key: x[key] for key in keys}
    fixed = {key: x[key] for key in KEYS if key not in keys}
    slopes = vmap(grad(one))(varied, fixed, BATCH["kind"])
    return sum((metric * g).flatten(1).square().sum(1) for g in slopes.values())


def weighted(values):
    return (BATCH["w"] * values).sum() / BATCH["w"].sum()


IMAGE, BOTH = gpkit.inputs("image"), gpkit.inputs(*KEYS)
CENTRAL = gpkit.finite_difference(side="central")
PENALTIES = {
    "r1": gpkit.r1(2.0, wrt=IMAGE),  # on the graph of the scores
    "r1_r2": gpkit.r1_r2(0.6, wrt=BOTH, estimator=CENTRAL),
    "given": gpkit.r1(2.0, wrt=IMAGE, given={"sample_weight": "w", "metric": "mask"}),
    "both": gpkit.r1_r2(2.0, wrt=IMAGE, given={"sample_weight": lambda batch: batch["w"]}),
    "gp": gpkit.wgan_gp(0.7, wrt=BOTH),
}


def total(real, fake, between, params):
    loss = score(params, fake).mean() - score(params, real).mean()
    loss = loss + n2(params, real, ["image"]).mean()
    loss = loss + 0.3 * (n2(params, real, KEYS) + n2(params, fake, KEYS)).mean()
    loss = loss + weighted(n2(params, real, ["image"], BATCH["mask"]))
    of_image = n2(params, real, ["image"]), n2(params, fake, ["image"])
    loss = loss + weighted(of_image[0]) + weighted(of_image[1])
    return loss + 0.7 * (n2(params, between, KEYS).sqrt() - 1).square().mean()


@pytest.mark.parametrize("form", [Critic, OfADict])
def test_a_step_of_the_critic(form):
    critic = form()
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    module = GANModule(Generator(), critic, latent_dim=3, penalty=PENALTIES, critic_optimizer=SGD)
    data = DataLoader([BATCH], batch_size=None)
    trainer(max_epochs=1, log_every_n_steps=1).fit(module, data)
    real, fake = critic.seen[:2]
    points = [x for x in critic.seen if len(x["table"]) == B]
    points = [x for x in points if not any(_same(x, y) for y in (real, fake))]
    alphas = [(x["table"] - fake["table"]) / (real["table"] - fake["table"]) for x in points]
    between = next(x for x, a in zip(points, alphas, strict=True) if _is_alpha(a))
    grads = grad(partial(total, real, fake, between))(before)
    for name, p in critic.named_parameters():
        torch.testing.assert_close(p, before[name] - RATE * grads[name], rtol=1e-6, atol=1e-8)
    metrics = module.trainer.callback_metrics
    after = {name: p.detach() for name, p in critic.named_parameters()}
    slopes = n2(before, real, KEYS).sqrt().mean(), n2(after, real, KEYS).sqrt().mean()
    assert min(abs(metrics["slope/real"] - slope) for slope in slopes) < 1e-6
    wanted = n2(before, real, ["image"]).mean()
    torch.testing.assert_close(metrics["penalty/r1"], wanted, check_dtype=False)


def _same(x, y):
    return all(torch.equal(x[key], y[key]) for key in KEYS)


def _is_alpha(alpha):
    return torch.allclose(alpha, alpha[:, :1]) and 0 < alpha.min() < alpha.max() < 1
