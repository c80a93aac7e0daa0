"""Labels drawn from the model: their distribution, and what a penalty of them expects."""

import itertools

import oracles
import pytest
import torch
import torch.nn.functional as F
from compiling import losses_and_gradients
from torch import nn
from torch.func import functional_call

import gpkit
from gpkit.axes.of import draw_labels


def model(classes=3, samples=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, classes)).double()
    return net, 2 * torch.randn(samples, 2, dtype=torch.float64)


def test_labels_follow_the_softmax():
    # catches labels that are drawn once for the batch, a shifted class, and an argmax
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    n = 100_000
    logits = probabilities.log().repeat(n, 1) + 3.0
    labels = draw_labels(logits, torch.Generator().manual_seed(0)).reshape(n, 3)
    counts = F.one_hot(labels, 3).double().mean(0)
    sigma = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((counts - probabilities).abs() <= 4 * sigma).all()
    pairs = ((labels[:, 0] == 2) & (labels[:, 1] == 1)).double().mean()
    assert pairs == pytest.approx(0.35, abs=4 * (0.35 * 0.65 / n) ** 0.5)


def test_expectation_is_the_sum_over_all_labels():
    net, x = model()
    params = {name: p.detach() for name, p in net.named_parameters()}
    probabilities = net(x).softmax(1).detach()

    expected, second = 0.0, 0.0
    for labels in map(torch.tensor, itertools.product(range(3), repeat=len(x))):
        chance = probabilities[torch.arange(len(x)), labels].prod().item()

        def risk(p, labels=labels):
            return F.cross_entropy(functional_call(net, p, (x,)), labels)

        value = oracles.weight_norm(risk, params).square().item()
        expected, second = expected + chance * value, second + chance * value**2
    penalty = gpkit.fisher(weight=1.0, seed=0)
    n = 300
    found = torch.stack([penalty(lambda: net(x), net).detach() for _ in range(n)])
    error = ((second - expected**2) / n) ** 0.5
    assert found.mean().item() == pytest.approx(expected, abs=3.5 * error)
    assert found.unique().numel() > 10  # drawn anew at every call

    # and it is tr F / B, F the mean of the samples' Fisher matrices
    per_sample = gpkit.fisher(weight=1.0, seed=0, scope="sample")
    traces = torch.stack([per_sample(lambda: net(x), net).detach() for _ in range(n)])
    assert traces.mean().item() / len(x) == pytest.approx(expected, rel=0.1)


def test_draws_are_the_penaltys_own_and_resume():
    net, x = model(samples=40)
    penalty, resumed = (gpkit.fisher(weight=1.0, seed=s) for s in (3, 4))
    before = torch.get_rng_state()
    penalty(net(x), net)
    assert torch.equal(torch.get_rng_state(), before)
    resumed.load_state_dict(penalty.state_dict())
    following = [penalty(net(x), net).item() for _ in range(3)]
    assert [resumed(lambda: net(x), net).item() for _ in range(3)] == following
    assert len(set(following)) == 3


def test_in_the_inputs_each_norm_is_that_of_one_label_of_the_sample():
    """As often as the model has it: catches a label of another sample, and the given ones."""
    net, x = model(samples=4)
    x.requires_grad_()
    logits = net(x)
    losses = [-logits.log_softmax(1)[:, y].sum() for y in range(3)]
    slopes = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    known = torch.stack([g.norm(dim=1) for g in slopes], 1)  # [B, classes]
    penalty = gpkit.GradientPenalty(of="sampled_loss", wrt="input", seed=0)
    norms = []
    for penalty.draws in range(400):  # each count of draws has its own labels
        norms.append(penalty.terms(logits, x).norms)
    norms = torch.stack(norms)  # [400, B]
    drawn = (norms[:, :, None] - known).abs() < 1e-9
    assert (drawn.sum(2) == 1).all()
    shares, probabilities = drawn.double().mean(0), logits.softmax(1).detach()
    sigma = (probabilities * (1 - probabilities) / 400).sqrt()
    assert ((shares - probabilities).abs() <= 4 * sigma).all()


def test_module_gives_it_the_training_logits():
    net, x = model(samples=40)
    y = torch.arange(40) % 3
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), gpkit.fisher(weight=0.3, seed=1))
    expected = F.cross_entropy(net(x), y) + gpkit.fisher(weight=0.3, seed=1)(net(x), net)
    torch.testing.assert_close(module.penalized_loss((x, y)), expected)


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
def test_compiled_draws_labels_of_its_own():
    net, x = model(classes=2, samples=1)  # whose gradient is one of two
    batch = x.float(), torch.zeros(1, dtype=torch.long)
    net = net.float()
    module = gpkit.PenalizedModule(
        net, nn.CrossEntropyLoss(), gpkit.fisher(weight=1.0), compile=True
    )
    found = {round(losses_and_gradients(module, [batch])[0][0].item(), 4) for _ in range(20)}
    risks = [F.cross_entropy(net(batch[0]), torch.tensor([label])) for label in (0, 1)]
    norms = [gpkit.weight_grad_norm(weight=1.0)(risk, net.parameters()) for risk in risks]
    assert found == {round((risks[0] + norm).item(), 4) for norm in norms}


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (4, 3, 2)])
def test_other_shapes_are_refused(shape):
    w = torch.ones(shape, requires_grad=True)
    with pytest.raises(ValueError, match=r"draws labels from logits \[B, C\].*not the loss"):
        gpkit.fisher()(w * 1, [w])
