"""GANModule trains as published loops do: on packs, on several scales, without needless work."""

import copy

import pytest
import torch
import torch.nn.functional as F
from gan_by_hand import interpolates, take
from gans import SGD, B, Witness, assert_same, critic, data, generator, module, trainer
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

import gpkit
from gpkit.lightning.gan.figures import GANFigures
from gpkit.lightning.gan.samples import packed


@pytest.mark.parametrize(
    ("penalty", "fakes"),
    [
        (gpkit.r1(), 0),
        (gpkit.dragan(), 0),
        (gpkit.r2(), 1),
        (gpkit.wgan_gp(), 1),
        (gpkit.r1_r2(), 1),
        (gpkit.weight_grad_norm(), 1),
        ([gpkit.r1(), gpkit.r2(every=2)], 0.5),
    ],
    ids=["r1", "dragan", "r2", "wgan_gp", "r1_r2", "weight", "both"],
)
def test_fakes_are_made_where_a_penalty_looks_at_them(penalty, fakes):
    G = generator()
    made = module(G, critic(), penalty=penalty, penalty_steps=True, critic_steps=100)
    trainer(max_steps=4, max_epochs=1).fit(made, DataLoader(data(), B))
    steps = made.counts["critic"]
    assert len(G.seen) == steps * (1 + fakes)


@pytest.mark.parametrize("form", ["squared", "max", "both"])
def test_penalties_on_real_and_fake_samples_take_no_forward_pass_of_their_own(form):
    labels = 2
    C, G = critic(labels), generator(labels)
    C.layers.insert(1, nn.BatchNorm1d(6).double())  # real and fake pass apart, as in the loss
    true = copy.deepcopy(C)
    penalty = {
        "squared": gpkit.r1_r2(3.0),
        "max": gpkit.GradientPenalty(at=gpkit.mixture("fake", "real"), reduce="max", weight=3.0),
        "both": [gpkit.r1_r2(3.0), gpkit.r1(5.0)],
    }[form]
    made = module(G, C, penalty=penalty, conditional=True, loss="hinge", critic_steps=100)
    trainer(max_epochs=1).fit(made, DataLoader(data(), B))
    assert len(C.seen) == 2 * 7
    optimizer, seen = SGD(true.parameters()), iter(C.seen)
    for x, y in DataLoader(data(), B):
        real, fake = (next(seen).requires_grad_() for _ in range(2))
        assert torch.equal(real, x)
        a, b = true(real, y), true(fake, y)
        (g,), (h,) = (
            torch.autograd.grad(s.sum(), t, create_graph=True) for s, t in ((a, real), (b, fake))
        )
        n2 = torch.stack([g.square().sum(1), h.square().sum(1)])
        term = {
            "squared": 3 / 2 * n2.mean(1).sum(),
            "max": 3 * n2.max(),
            "both": 3 / 2 * n2.mean(1).sum() + 5 / 2 * n2[0].mean(),
        }[form]
        optimizer.zero_grad()
        ((1 - a).relu().mean() + (1 + b).relu().mean() + term).backward()
        optimizer.step()
    assert_same(made.critic, true)


def test_the_penaltys_own_forward_pass_may_be_as_in_training():
    C = Witness(spectral_norm(nn.Linear(2, 6)), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
    true, streams = copy.deepcopy(C), []
    C.register_forward_pre_hook(lambda net, x: streams.append(torch.get_rng_state()))
    penalty = gpkit.wgan_gp(5.0, forward="training")
    made = module(generator(), C, penalty=penalty, critic_steps=100)
    trainer(max_epochs=1).fit(made, DataLoader(data(), B))
    assert len(C.seen) == len(streams) == 3 * 7
    optimizer, calls = SGD(true.parameters()), iter(zip(C.seen, streams, strict=True))

    def scored():
        x, stream = next(calls)
        torch.set_rng_state(stream)
        x.requires_grad_()
        return x, true(x)

    for _ in range(7):
        (real, a), (fake, b), (point, c) = scored(), scored(), scored()
        alpha = (point - fake) / (real - fake)
        torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))
        (g,) = torch.autograd.grad(c.sum(), point, create_graph=True)
        total = b.mean() - a.mean() + 5 * (g.square().sum(1).sqrt() - 1).square().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert_same(made.critic, true)


def critic_of_pairs():
    return Witness(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))


def test_packs_are_scored_as_ctgan_does():
    G, C = generator(), critic_of_pairs()
    true_G, true_C = copy.deepcopy(G), copy.deepcopy(C)
    made = module(G, C, penalty=gpkit.wgan_gp(0.5), pac=2, critic_steps=1)
    trainer().fit(made, DataLoader(data(), B))
    latents, packs = iter(G.seen), [x for x, _ in DataLoader(data(), B)] * 2
    points = iter(interpolates(C.seen, data().tensors[0].reshape(-1, 4)))
    oG, oC = SGD(true_G.parameters()), SGD(true_C.parameters())
    for x in packs:
        real, fake = x.view(-1, 4), true_G(next(latents)).detach().view(-1, 4)
        point = next(points).requires_grad_()
        alpha = (point - fake) / (real - fake)
        torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))  # one for a pack
        (g,) = torch.autograd.grad(true_C(point).sum(), point, create_graph=True)
        term = 0.5 * (g.view(-1, 4).norm(2, dim=1) - 1).square().mean()
        take(oC, list(true_C.parameters()), true_C(fake).mean() - true_C(real).mean() + term)
        scores = true_C(true_G(next(latents)).view(-1, 4))
        take(oG, list(true_G.parameters()), -scores.mean())
    assert_same(made.critic, true_C)
    assert_same(made.generator, true_G)


def test_packs_of_images_and_of_labels():
    images = torch.arange(4 * 3 * 2 * 2.0).reshape(4, 3, 2, 2)
    assert torch.equal(packed(images, 2)[1], torch.cat([images[2], images[3]]))
    assert packed({"a": torch.arange(4)}, 2)["a"].tolist() == [[0, 1], [2, 3]]
    assert packed(images, 1) is images
    made = module(generator(), critic(), pac=3)
    with pytest.raises(ValueError, match=r"`pac=3` needs batches.*of 3; got 4 samples.*drop_last"):
        trainer().fit(made, DataLoader(data(), B))


class Scales(Witness):
    """A critic with a score of each sample, and three of each half of it."""

    def __init__(self):
        super().__init__(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
        self.fine = nn.Linear(1, 3).double()

    def forward(self, x, y=None):
        return [super().forward(x), self.fine(x[:, :1]).tanh()]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["r1_r2", "wgan_gp", "weight"])
def test_the_losses_of_all_scales_are_summed(name, apart):
    C = Scales()
    true = copy.deepcopy(C)
    penalty = {
        "r1_r2": gpkit.r1_r2(3.0),
        "wgan_gp": gpkit.wgan_gp(5.0),
        "weight": gpkit.weight_grad_norm(0.2),
    }[name]
    options = {"loss": "relativistic", "critic_steps": 2, "penalty_steps": apart}
    made = module(generator(), C, penalty=penalty, **options)
    options = {"log_every_n_steps": 1, "max_epochs": 1, "limit_train_batches": 1}
    seen = []
    C.register_forward_pre_hook(lambda net, x: seen.append(x[0].detach().clone()))
    trainer(**options).fit(made, DataLoader(data(), B))

    def loss(real, fake):
        return sum(F.softplus(b - a).mean() for a, b in zip(true(real), true(fake), strict=True))

    def steepness(x):
        x = x.clone().requires_grad_()
        coarse, fine = true(x)
        y = coarse.sum() + fine.mean(1).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return g.square().sum(1)

    optimizer, params = SGD(true.parameters()), list(true.parameters())
    real, fake = seen[:2]
    total = loss(real, fake)
    if apart:
        take(optimizer, params, total)
        total = 0.0
        real, fake = seen[-2:]  # after those of the slopes
    if name == "r1_r2":
        if apart:
            real, fake = seen[-1].chunk(2)
        total = total + 3 / 2 * (steepness(real).mean() + steepness(fake).mean())
    elif name == "wgan_gp":
        points = seen[-1] if apart else seen[2]
        total = total + 5 * (steepness(points).sqrt() - 1).square().mean()
    else:
        grads = torch.autograd.grad(loss(real, fake), params, create_graph=True)
        total = total + 0.2 * sum(g.square().sum() for g in grads)
    take(optimizer, params, total)
    assert_same(made.critic, true)
    assert made.scalars.means()["slope/real"] > 0


@pytest.mark.parametrize("pac", [1, 2])
def test_figures_of_several_scales_and_of_packs(pac, tmp_path):
    C = Scales() if pac == 1 else critic_of_pairs()
    figures = GANFigures(points=8)
    options = {"max_epochs": 1, "callbacks": [figures], "default_root_dir": tmp_path}
    trainer(**options).fit(module(generator(), C, pac=pac), DataLoader(data(), B))
    drawn = {path.stem for path in tmp_path.rglob("*.png")}
    assert drawn == ({"samples", "surface"} if pac == 1 else {"samples"})


def test_a_list_without_scores_is_refused():
    C = critic()
    C.register_forward_hook(lambda net, x, y: [y, y.mean()])
    made = module(generator(), C)
    with pytest.raises(ValueError, match=r"or a list of such scores.*got a list with \[\]"):
        trainer().fit(made, DataLoader(data(), B))


@pytest.mark.parametrize("first", [True, False])
def test_the_generator_steps_with_the_first_or_the_last_of_the_critics_steps(first):
    made = module(generator(), critic(), generator_first=first, critic_steps=3)
    order = []
    step = made.on_before_optimizer_step
    made.on_before_optimizer_step = lambda optimizer: (
        order.append(
            "G"
            if optimizer.param_groups[0]["params"][0] is made.generator.layers[0].weight
            else "C"
        )
        or step(optimizer)
    )
    trainer(max_epochs=1).fit(made, DataLoader(data(), B))
    assert "".join(order) == ("GCCCGCCCGC" if first else "CCCGCCCGC")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pac": 0}, ValueError, r"`pac=...` must be an integer >= 1; got 0"),
        ({"generator_penalty_shrink": 1.5}, ValueError, r"must be an integer >= 1; got 1.5"),
        ({"simultaneous": True, "generator_first": True}, ValueError, r"leave one of them out"),
        ({"mapping": "style"}, TypeError, r"'auto', None, or the names of two parts"),
        ({"mapping": ("layers", "synth")}, ValueError, r"'synth', which the generator Witness"),
    ],
)
def test_wrong_options(arguments, error, words):
    with pytest.raises(error, match=words):
        module(generator(), critic(), **arguments)
