"""Penalties that start from the scores of the loss, and evaluate the critic at other points."""

import copy
from functools import partial

import pytest
import torch
from gan_by_hand import slope
from gans import B, D, Witness, critic, data, generator, module, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit

SIGMA = 0.3
SGD = partial(torch.optim.SGD, lr=0.1)


def fitted(penalty, C, G=None, steps=1, **options):
    """Return a critic as it was before its steps, and the module after them."""
    before = copy.deepcopy(C)
    options = {"critic_optimizer": SGD, "critic_steps": 9, **options}
    made = module(G or generator(), C, penalty=penalty, **options)
    trainer(limit_train_batches=steps, max_epochs=1).fit(made, DataLoader(data(), B))
    return before, made


def assert_stepped(before, made, total):
    params = list(before.parameters())
    grads = torch.autograd.grad(total, params, allow_unused=True)
    for p, q, g in zip(params, made.critic.parameters(), grads, strict=True):
        wanted = p if g is None else p - 0.1 * g
        torch.testing.assert_close(q, wanted, rtol=1e-6, atol=1e-9)


def changes(C, x, moved):
    return (C(moved) - C(x)).square()[:, 0].mean()


KINDS = {
    "r1": (partial(gpkit.approximate_r1, 7.0, SIGMA), ("real",)),
    "r2": (partial(gpkit.approximate_r2, 7.0, SIGMA), ("fake",)),
    "both": (
        lambda: gpkit.sum([gpkit.approximate_r1(7.0, SIGMA), gpkit.approximate_r2(7.0, SIGMA)]),
        ("real", "fake"),
    ),
}


@pytest.mark.parametrize(("build", "kinds"), KINDS.values(), ids=KINDS)
def test_the_difference_starts_from_the_scores_of_the_loss(build, kinds):
    """The first step runs the critic once more, to see that it repeats itself."""
    before, made = fitted(build(), critic())
    real, fake, *others = made.critic.seen
    x = {"real": real, "fake": fake}
    moved = [z for z in others if not any(torch.equal(z, y) for y in x.values())]
    assert len(others) - len(moved) == 1
    assert len(moved) == len(kinds)
    total = before(fake).mean() - before(real).mean()
    for kind, z in zip(kinds, moved, strict=True):
        assert 0.1 < float((z - x[kind]).std()) < 0.6
        total = total + 7.0 * changes(before, x[kind], z)
    assert_stepped(before, made, total)


def test_a_later_step_runs_the_critic_three_times():
    _, made = fitted(gpkit.approximate_r1(7.0, SIGMA), critic(), steps=3)
    seen = made.critic.seen[:]
    assert len(seen) == 4 + 3 + 3
    real, fake, moved = seen[-3:]
    assert float((moved - real).abs().max()) < 6 * SIGMA < float((moved - fake).abs().max()) * 6


def test_finite_differences_start_from_them_too():
    penalty = gpkit.r1(3.0, estimator=gpkit.finite_difference(1e-4, "central"))
    before, made = fitted(penalty, critic())
    real, fake, *others = made.critic.seen
    assert len(others) == 1 + 2
    total = before(fake).mean() - before(real).mean() + 3 / 2 * slope(before, real, None).mean()
    assert_stepped(before, made, total)


def test_r1_and_r2_in_one_difference_with_packs_and_labels():
    at = gpkit.mixture("real", "fake", balanced=True)
    estimator = gpkit.random_difference(SIGMA)
    penalty = gpkit.GradientPenalty(at=at, estimator=estimator, weight=2.0)
    before, made = fitted(penalty, critic(2), conditional=True, steps=1)
    labels = data()[:][1]
    real, fake, *others = made.critic.seen
    moved = [z for z in others if not (torch.equal(z, real) or torch.equal(z, fake))]
    order = {tuple(x.tolist()): int(y) for x, y in zip(*data()[:], strict=True)}
    y = torch.tensor([order[tuple(x.tolist())] for x in real])
    assert len(labels) == len(order)
    total = before(fake, y).mean() - before(real, y).mean()
    for x, z in zip((real, fake), moved, strict=True):
        change = (before(z, y) - before(x, y)).square()[:, 0].mean() / SIGMA**2
        total = total + change  # 2.0 times the mean of the two means
    assert_stepped(before, made, total)


@pytest.mark.parametrize(
    "penalty",
    [
        gpkit.approximate_r1(1.0, 1e-4),
        gpkit.r1(1.0, estimator=gpkit.finite_difference(1e-4)),
    ],
)
def test_the_moved_pass_has_the_dropout_and_the_buffers_of_the_first(penalty):
    """With other masks, or vectors of spectral norm, the difference would be of order 1/h."""
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(D, 32))
    C = Witness(spectral, nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 1))
    _, made = fitted(penalty, C, steps=2)
    norms = made.latest_step.terms["approximate_r1" if "approx" in penalty.name else "r1"].norms
    bound = 2 * made.critic.layers[3].weight.detach().norm() * 2
    assert 0 < float(norms.detach().max()) < float(bound)


def test_in_bfloat16_the_difference_is_of_its_scores():
    """Under autocast, as by hand."""
    C = critic().float()
    before = copy.deepcopy(C)
    made = module(generator().float(), C, penalty=gpkit.approximate_r1(7.0, SIGMA), critic_steps=9)
    made.make_optimizer["critic"] = SGD
    x = TensorDataset(data()[:][0].float())
    trainer(limit_train_batches=1, max_epochs=1, precision="bf16-mixed").fit(made, DataLoader(x, B))
    real, fake, *others = made.critic.seen
    moved = next(z for z in others if not torch.equal(z, real))
    with torch.autocast("cpu", torch.bfloat16):
        scores = [before(z).float() for z in (real, fake, moved)]
    total = scores[1].mean() - scores[0].mean() + 7 * (scores[2] - scores[0]).square().mean()
    grads = torch.autograd.grad(total, list(before.parameters()), allow_unused=True)
    for p, q, g in zip(before.parameters(), made.critic.parameters(), grads, strict=True):
        wanted = p if g is None else p - 0.1 * g
        torch.testing.assert_close(q, wanted, rtol=0.02, atol=2e-3)
        assert g is None or not g.any() or not torch.equal(p, q)


class Half(Witness):
    """Computes in bfloat16 itself, whatever it is given."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.bfloat16()

    def forward(self, x, y=None):
        return super().forward(x.bfloat16())


def test_a_step_below_the_spacing_of_the_critics_own_dtype_is_refused():
    """The losses are of scores in float32, and the spacing is that of bfloat16."""
    C = Half(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1)).bfloat16()
    with pytest.raises(ValueError, match=r"sigma=0\.005\)` is below 0\.0"):
        fitted(gpkit.approximate_r1(7.0, 0.005), C, generator().bfloat16())


class Drifting(Witness):
    """Draws from a stream that nobody finds."""

    def forward(self, x, y=None):
        return super().forward(x) + self.draw().random()

    @staticmethod
    def draw(made=[]):  # noqa: B006
        import secrets

        return secrets.SystemRandom()


def test_a_critic_that_does_not_repeat_its_scores_is_refused():
    C = Drifting(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1))
    with pytest.raises(RuntimeError, match="gives another value when it is run again"):
        fitted(gpkit.approximate_r1(7.0, SIGMA), C)
