"""Penalties in several entries of a dict of inputs, against loops by hand in torch alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import gpkit

B = 6
RATE = 0.05
RNG = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


class Net(nn.Module):
    """A table's columns, an image and a category."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.category, self.conv = nn.Embedding(3, 2), nn.Conv2d(1, 2, 2)
        self.columns, self.head = nn.Linear(3, 4), nn.Linear(14, 1)
        self.double()

    def forward(self, category, columns, image, scale=1.0):
        h = [self.category(category), self.columns(columns), self.conv(image).flatten(1)]
        return self.head(torch.tanh(torch.cat(h, 1))).squeeze(1) * scale


PLAIN = Net()
BATCH = {
    "category": torch.tensor([0, 2, 1, 1, 0, 2]),
    "columns": draw(B, 3) * torch.tensor([0.1, 2.0, 0.5, 3.0, 1.0, 1.5]).unsqueeze(1),
    "image": draw(B, 1, 3, 3),
    "labels": draw(B),
    "slopes": draw(B, 3),
}
OTHERS = {key: BATCH[key] for key in ("category", "columns", "image")}
KEYS = ("columns", "image")
W = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)


def n2(params, of_loss, keys=KEYS, batch=BATCH, target=0.0):
    """Return Σ_keys ‖∂f_i/∂x_i‖² of each sample."""

    def one(varied, fixed, y):
        x = {**fixed, **varied}
        out = functional_call(PLAIN, params, (), {k: v.unsqueeze(0) for k, v in x.items()})[0]
        return (out - y).square() if of_loss else out

    varied = {key: batch[key] for key in keys}
    fixed = {key: batch[key] for key in OTHERS if key not in keys}
    slopes = vmap(grad(one))(varied, fixed, BATCH["labels"])
    return sum((g - target).flatten(1).square().sum(1) for g in slopes.values())


def params_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def assert_is(value, net, by_hand, rtol=1e-9):
    params = params_of(net)
    torch.testing.assert_close(value.detach(), by_hand(params), rtol=rtol, atol=0)
    found = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    wanted = list(grad(by_hand)(params).values())
    largest = max(float(g.abs().max()) for g in wanted)
    for a, b in zip(found, wanted, strict=True):
        a = torch.zeros_like(b) if a is None else a
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * largest)


CENTRAL = gpkit.finite_difference(side="central")
ESTIMATORS = {
    "exact": ("exact", 1e-9),
    "difference": (CENTRAL, 1e-6),
    "stencil": (gpkit.stencil(1e-3, 4), 1e-6),
}


@pytest.mark.parametrize("keys", [KEYS, ("image",)], ids="+".join)
@pytest.mark.parametrize(("estimator", "rtol"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_in_a_loop(estimator, rtol, keys):
    net = Net()
    penalty = gpkit.GradientPenalty(wrt=gpkit.inputs(*keys), estimator=estimator, weight=0.7)
    f = lambda batch: net(**batch)  # noqa: E731
    value = penalty(f, OTHERS, sample_weight=W)
    assert_is(value, net, lambda p: 0.7 * (W * n2(p, False, keys)).sum() / W.sum(), rtol)


def test_in_a_loop_with_a_graph_and_a_target():
    net = Net()
    x = {key: v.requires_grad_() if key in KEYS else v for key, v in copied().items()}
    penalty = gpkit.GradientPenalty(wrt=gpkit.inputs(*KEYS))
    assert_is(penalty(net(**x), x), net, lambda p: n2(p, False).mean())
    columns = gpkit.GradientPenalty(wrt=gpkit.inputs("columns"))
    value = columns(net(**x), x, target={"columns": BATCH["slopes"]})
    assert_is(value, net, lambda p: n2(p, False, ("columns",), target=BATCH["slopes"]).mean())


def test_constants_that_differ_are_those_of_the_points():
    net, fake = Net(), {**OTHERS, "columns": draw(B, 3), "image": draw(B, 1, 3, 3)}
    of = partial(n2, of_loss=False, keys=("image",))
    image, critic = gpkit.inputs("image"), lambda batch: net(**batch)
    for penalty, wanted in (
        (gpkit.r1(2.0, wrt=image), lambda p: of(p).mean()),
        (gpkit.r2(2.0, wrt=image), lambda p: of(p, batch={**BATCH, **fake}).mean()),
        (gpkit.r1_r2(2.0, wrt=image), lambda p: (of(p) + of(p, batch={**BATCH, **fake})).mean()),
    ):
        assert_is(penalty(critic, real=OTHERS, fake=fake), net, wanted)
    assert gpkit.dragan(wrt=image)(critic, real=OTHERS, fake=fake).isfinite()


def copied():
    return {key: v.clone() for key, v in OTHERS.items()}


def test_points_between_dicts():
    """With one α for all entries of a sample, and the constants of both."""
    net, seen = Net(), []
    fake = {**OTHERS, "columns": draw(B, 3), "image": draw(B, 1, 3, 3)}

    def critic(batch):
        seen.append(batch)
        return net(**batch)

    value = gpkit.wgan_gp(1.0, wrt=gpkit.inputs(*KEYS))(critic, real=OTHERS, fake=fake)
    points = {**BATCH, **{key: seen[0][key].detach() for key in KEYS}}
    assert seen[0]["category"] is OTHERS["category"]
    ratio = [((points[k] - fake[k]) / (OTHERS[k] - fake[k])).flatten(1) for k in KEYS]
    torch.testing.assert_close(ratio[0][:, :1].expand_as(ratio[1]), ratio[1])
    assert_is(value, net, lambda p: (n2(p, False, batch=points).sqrt() - 1).square().mean())
    both = gpkit.r1_r2(1.0, wrt=gpkit.inputs(*KEYS))(critic, real=OTHERS, fake=fake)
    wanted = lambda p: (n2(p, False) + n2(p, False, batch={**BATCH, **fake})).mean() / 2  # noqa: E731
    assert_is(both, net, wanted)
    with pytest.raises(ValueError, match="real= and fake= must have the same 'category'"):
        gpkit.wgan_gp(wrt=gpkit.inputs(*KEYS))(
            critic, real=OTHERS, fake={**fake, "category": 2 - OTHERS["category"]}
        )


@pytest.mark.parametrize("of", ["loss", "output"])
@pytest.mark.parametrize(("estimator", "rtol"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_in_the_module(estimator, rtol, of):
    penalty = gpkit.GradientPenalty(of=of, wrt=gpkit.inputs(*KEYS), estimator=estimator, weight=0.7)
    module = gpkit.PenalizedModule(Net(), nn.MSELoss(), penalty, inputs=list(OTHERS))
    before = {key: v.clone() for key, v in BATCH.items()}

    def by_hand(params):
        out = functional_call(module.net, params, (), OTHERS)
        return (out - BATCH["labels"]).square().mean() + 0.7 * n2(params, of == "loss").mean()

    assert_is(module.penalized_loss(BATCH), module.net, by_hand, rtol)
    assert not any(v.requires_grad for v in BATCH.values())
    assert all(torch.equal(v, BATCH[key]) for key, v in before.items())


def test_in_the_module_with_others_at_other_points_and_by_a_dict():
    """Two penalties in different entries, of one forward pass; and one at moved points."""
    net = Net()
    penalties = {
        "image": gpkit.input_grad_norm(0.7, wrt=gpkit.inputs("image")),
        "columns": gpkit.GradientPenalty(
            wrt=gpkit.inputs("columns"), given={"target": "slopes"}, weight=0.3
        ),
        "moved": gpkit.GradientPenalty(
            wrt=gpkit.inputs(*KEYS), at=lambda x, _: tuple(t + 1 for t in x), weight=0.2
        ),
    }
    module = gpkit.PenalizedModule(net, nn.MSELoss(), penalties)
    moved = {**BATCH, **{key: BATCH[key] + 1 for key in KEYS}}

    def by_hand(params):
        loss = (functional_call(net, params, (), OTHERS) - BATCH["labels"]).square().mean()
        loss = loss + 0.7 * n2(params, True, ("image",)).mean()
        loss = loss + 0.3 * n2(params, False, ("columns",), target=BATCH["slopes"]).mean()
        return loss + 0.2 * n2(params, False, batch=moved).mean()

    assert_is(module.penalized_loss(BATCH), net, by_hand)
    alone = gpkit.PenalizedModule(net, nn.MSELoss(), penalties["image"])
    pair = (OTHERS, BATCH["labels"])

    def of_pair(params):
        loss = (functional_call(net, params, (), OTHERS) - BATCH["labels"]).square().mean()
        return loss + 0.7 * n2(params, True, ("image",)).mean()

    assert_is(alone.penalized_loss(pair), net, of_pair)


def test_one_input_of_a_dict_batch():
    """A net of one input gets it by position."""
    net = nn.Linear(3, 1).double()
    penalty = gpkit.GradientPenalty(wrt=gpkit.inputs("x"))
    module = gpkit.PenalizedModule(net, lambda out, y: out.mean(), penalty)
    x = draw(B, 3)
    value = module.penalized_loss({"x": x, "y": torch.zeros(B)})
    torch.testing.assert_close(value, net(x).mean() + net.weight.square().sum())


SGD = partial(torch.optim.SGD, lr=RATE)
NAMED = gpkit.GradientPenalty(wrt=gpkit.inputs("colums", "image"))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: gpkit.inputs(0), TypeError, r"takes names of entries.*got 0"),
        (lambda: gpkit.inputs("a", "a"), ValueError, r"each entry once; got \['a', 'a'\]"),
        (lambda: NAMED(lambda b: b, OTHERS), ValueError, "did you mean 'columns'"),
        (
            lambda: NAMED(lambda x: x.sum(1), draw(3, 2)),
            TypeError,
            r"got a Tensor: penalty\(f, \{'colums': x, ...\}\)",
        ),
        (
            lambda: gpkit.PenalizedModule(
                Net(), nn.MSELoss(), NAMED, inputs=list(OTHERS)
            ).penalized_loss(BATCH),
            TypeError,
            r"names 'colums'.*did you mean 'columns'",
        ),
        (
            lambda: gpkit.PenalizedModule(
                Net(), nn.MSELoss(), gpkit.r1(wrt=gpkit.inputs("category")), inputs=list(OTHERS)
            ).penalized_loss(BATCH),
            TypeError,
            "'category', which must be a floating-point tensor; got torch.int64",
        ),
    ],
)
def test_what_makes_no_sense(act, error, words):
    with pytest.raises(error, match=words):
        act()
