"""What a message advises works: each refusal, then the same call with the advice followed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpkit

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net(outputs=12, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)


def ctc(module, **axes):
    """The loss of a transcription of six frames with four symbols."""
    head = nn.Linear(12, 24).double()

    def losses(x):
        frames = head(module(x)).reshape(len(x), 6, 4).log_softmax(2)
        targets = torch.tensor([[1, 2]]).expand(len(x), 2)
        lengths = torch.full((len(x),), 6), torch.full((len(x),), 2)
        return F.ctc_loss(frames.transpose(0, 1), targets, *lengths, reduction="none")

    return gpkit.input_grad_norm(**axes)(losses, X.double())


def pdist(module, distances):
    def score(x):
        points = module(x).reshape(len(x), 4, 3)
        return torch.stack([distances(p).sum() for p in points])

    return gpkit.r1()(score, real=X.double())


def mm(p):
    return torch.cdist(p, p, compute_mode="use_mm_for_euclid_dist").triu(1)


def bag(module, mean):
    table, ids = nn.EmbeddingBag(10, 6).double(), torch.tensor([[1, 2, 2], [0, 3, 9]])

    def loss():
        h = F.embedding(ids, table.weight).mean(1) if mean else table(ids)
        return module(h).square().mean()

    return gpkit.weight_grad_norm()(loss, [*module.parameters(), table.weight])


def generator(module, used_up):
    parameters = module.parameters()
    if used_up:
        list(parameters)
    return gpkit.weight_grad_norm()(module(X.double()).square().mean(), parameters)


def empty(module):
    made = module.to_empty(device="cpu")
    for p in made.parameters():
        nn.init.normal_(p)
    return made


ADVICE = {
    "ctc_loss": (
        lambda: ctc(net()),
        r'ctc_loss has no second derivative: use estimator="finite_difference"',
        lambda: ctc(net(), estimator="finite_difference"),
    ),
    "pdist": (
        lambda: pdist(net(), F.pdist),
        r"torch.pdist has no second derivative: .* torch.cdist .*use_mm_for_euclid_dist",
        lambda: pdist(net(), mm),
    ),
    "embedding_bag": (
        lambda: bag(net(), mean=False),
        r"embedding_bag has no second derivative: use nn.Embedding and a mean",
        lambda: bag(net(), mean=True),
    ),
    "another dtype": (
        lambda: gpkit.r1()(net(1), real=X),
        r"torch.float32 and the net's parameters torch.float64: give the penalty x.to\(torch.fl",
        lambda: gpkit.r1()(net(1), real=X.to(torch.float64)),
    ),
    "the meta device": (
        lambda: gpkit.r1()(net(1).to("meta"), real=X.double()),
        r"move the net with .to_empty\(device=...\), and initialise it",
        lambda: gpkit.r1()(empty(net(1).to("meta")), real=X.double()),
    ),
    "a generator that was used up": (
        lambda: generator(net(), used_up=True),
        r"is it a generator that was used up\? Give the penalty the module, or list\(net.param",
        lambda: generator(net(), used_up=False),
    ),
    "an optimiser": (
        lambda: gpkit.weight_grad_norm()(X.sum(), torch.optim.SGD(net().parameters())),
        r"takes a module or its parameters, .*; got a SGD: penalty\(loss, net\)",
        lambda: generator(net(), used_up=False),
    ),
    "the net first": (
        lambda: (lambda n: gpkit.weight_grad_norm()(n, n(X.double()).sum()))(net()),
        r"the loss, or a closure that returns it, comes first: penalty\(loss, net\)",
        lambda: (lambda n: gpkit.weight_grad_norm()(n(X.double()).square().sum(), n))(net()),
    ),
    "a class on an axis": (
        lambda: gpkit.GradientPenalty(at=gpkit.interpolate),
        r"got the class interpolate: add parentheses, interpolate\(...\)",
        lambda: gpkit.GradientPenalty(at=gpkit.interpolate())(
            net(1), real=X.double(), fake=-X.double()
        ),
    ),
    "another project's name of the weight": (
        lambda: gpkit.wgan_gp(lambda_gp=10),
        r"`wgan_gp\(...\)` has no argument 'lambda_gp' \(did you mean 'weight'\?\)",
        lambda: gpkit.wgan_gp(weight=10)(net(1), real=X.double(), fake=-X.double()),
    ),
    "samples to a preset": (
        lambda: gpkit.r1(real=X),
        r"makes a penalty and takes no real=; call the penalty with it",
        lambda: gpkit.r1()(net(1), real=X.double()),
    ),
    "a net to a preset": (
        lambda: gpkit.r1(net(1)),
        r"got a Sequential: make the penalty first, and then call it",
        lambda: gpkit.r1(weight=10.0)(net(1), real=X.double()),
    ),
    "no fakes": (
        lambda: gpkit.wgan_gp()(net(1), real=X.double()),
        r"needs fake=..., which was not given",
        lambda: gpkit.wgan_gp()(net(1), real=X.double(), fake=-X.double()),
    ),
}


@pytest.mark.parametrize("kind", ADVICE)
def test_the_advice_works(kind):
    wrong, said, right = ADVICE[kind]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=said) as error:
        wrong()
    assert "\n" not in str(error.value)
    value = right()
    assert value.item() > 0
    value.backward()
