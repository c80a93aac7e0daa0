"""What the doctor measures, against the same by hand in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit

B, N = 6, 4
DOUBLE = torch.float64


def setting(outputs=1):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return net, torch.randn(B, N, dtype=DOUBLE), torch.randn(B, outputs, dtype=DOUBLE)


def by_hand(net, x, y, weight):
    """Return L, ∇L, P and ∇P of a mean square and R1, for images or vectors of unequal slopes."""
    params = list(net.parameters())
    loss = (net(x) - y).square().mean()
    of_loss = torch.autograd.grad(loss, params)
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    penalty = weight / 2 * g.flatten(1).square().sum(1).mean()
    of_penalty = torch.autograd.grad(penalty, params, allow_unused=True, materialize_grads=True)
    return loss.item(), of_loss, penalty.item(), of_penalty


def norm(grads):
    return math.sqrt(sum(g.square().sum().item() for g in grads))


def test_sizes_and_the_suggested_weight():
    net, x, y = setting()
    report = gpkit.diagnose(net, gpkit.r1(3.0), (x, y), share=0.25, costs=False)
    loss, of_loss, penalty, of_penalty = by_hand(net, x, y, 3.0)
    numbers = report.numbers["r1"]
    assert numbers["loss"] == pytest.approx(loss, rel=1e-9)
    assert numbers["penalty"] == pytest.approx(penalty, rel=1e-9)
    assert numbers["norm of its gradient"] == pytest.approx(norm(of_penalty), rel=1e-9)
    assert numbers["norm of the loss's gradient"] == pytest.approx(norm(of_loss), rel=1e-9)
    weight = numbers["suggested weight"]
    *_, of_suggested = by_hand(net, x, y, weight)
    assert norm(of_suggested) == pytest.approx(0.25 * norm(of_loss), rel=1e-9)
    (found,) = [f for f in report.findings if f.code == "strength"]
    assert f"weight={weight:.2g} makes its gradient 25% of the loss's" == found.fix


def test_the_curve_over_weights():
    net, x, y = setting()
    rows = gpkit.diagnose(net, gpkit.r1(3.0), (x, y), costs=False).numbers["r1"]["curve"]
    assert [row["weight"] for row in rows] == pytest.approx([3.0 * 10**k for k in range(-3, 4)])
    loss, of_loss, _, _ = by_hand(net, x, y, 3.0)
    params = list(net.parameters())
    length = 0.01 * norm(p.detach() for p in params)

    def after(grads):
        moved = nn.Sequential(nn.Linear(N, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        with torch.no_grad():
            for p, q, g in zip(moved.parameters(), params, grads, strict=True):
                p.copy_(q - length * g / norm(grads))
            return (moved(x) - y).square().mean().item()

    for row in rows:
        *_, of_penalty = by_hand(net, x, y, row["weight"])
        total = [a + b for a, b in zip(of_loss, of_penalty, strict=True)]
        assert row["share"] == pytest.approx(norm(of_penalty) / norm(total), rel=1e-8)
        kept = (loss - after(total)) / (loss - after(of_loss))
        assert row["kept"] == pytest.approx(kept, rel=1e-6)


def test_a_weight_with_a_schedule_and_every():
    """The penalty is compared as it acts on average, not where `every` multiplies it."""
    net, x, y = setting()
    plain = gpkit.diagnose(net, gpkit.r1(3.0), (x, y), costs=False).numbers["r1"]
    lazy = gpkit.diagnose(net, gpkit.r1(3.0, every=4), (x, y), costs=False)
    assert lazy.numbers["r1"]["penalty"] == pytest.approx(plain["penalty"])
    assert "convention" in lazy.codes
    later = gpkit.diagnose(net, gpkit.r1(gpkit.warmup(3.0, 10)), (x, y), costs=False)
    assert later.ok  # it is zero at the first step
    assert later.numbers["r1"]["norm of its gradient"] > 0


class Hand(torch.autograd.Function):
    """x Wᵀ, whose backward has the weight as a constant: the penalty does not train it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight.detach()
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g @ ctx.weight, g.T @ x


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.unused, self.function = nn.Linear(N, 5), nn.Linear(2, 2), function
        self.last = nn.Linear(5, 1, bias=False)

    def forward(self, x):
        return self.function(self.first(x).tanh(), self.last.weight)


@pytest.mark.parametrize("cut", [True, False])
def test_the_parameters_that_a_penalty_trains(cut):
    torch.manual_seed(0)
    net, x = Net(Hand.apply if cut else F.linear), torch.randn(B, N)
    report = gpkit.diagnose(net, gpkit.r1(), (x, torch.randn(B, 1)), costs=False)
    found = {f.code: f for f in report.findings}
    assert ("partial-gradient" in found) == cut
    assert report.ok != cut  # the gradient is wrong too
    trained = ["first.weight", "first.bias"] + ["last.weight"] * (not cut)
    assert report.numbers["r1"]["trains"] == trained
    assert "unused.weight, unused.bias" in found["reached"].why
    if cut:
        assert "last.weight have a gradient of the loss" in found["partial-gradient"].why


def test_half_precision():
    """A float16 net is compared in float32: what has underflowed cannot be seen in it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, 5), nn.Tanh(), nn.Linear(5, 1))
    for p in net.parameters():
        p.data *= 3e-4
    x = torch.randn(B, N)
    report = gpkit.diagnose(net.half(), gpkit.r1(), x.half(), costs=False)
    (found,) = [f for f in report.findings if f.code == "float16-underflow"]
    assert found.severity == "warning"
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(net.float()(x).sum(), x)
    scale = 2.0 ** math.floor(math.log2(1 / g.abs().max()))
    assert f"scale={scale:g}" in found.fix


def test_time_and_memory():
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    numbers = gpkit.diagnose(net, gpkit.r1(), torch.randn(256, 64)).numbers["r1"]
    assert numbers["time in plain steps"] > 1
    assert numbers["memory in plain steps"] > 1


class Several(nn.Module):
    """Tokens, a mask, and a vector: the vector is the input that penalties differentiate in."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(7, 4), nn.Linear(8, 3)

    def forward(self, tokens, mask, vector):
        h = (self.table(tokens) * mask[..., None]).mean(1)
        return self.last(torch.cat([h, vector], 1).tanh())


@pytest.mark.parametrize("kind", [tuple, dict])
def test_several_inputs(kind):
    torch.manual_seed(0)
    net, y = Several().double(), torch.arange(B) % 3
    parts = torch.randint(7, (B, 5)), torch.ones(B, 5).long(), torch.randn(B, 4, dtype=DOUBLE)
    names = ("tokens", "mask", "vector")
    example = (parts, y) if kind is tuple else {**dict(zip(names, parts, strict=True)), "labels": y}
    penalties = [gpkit.input_grad_norm(0.5), gpkit.weight_grad_norm(0.5)]
    loss = nn.CrossEntropyLoss(reduction="none")
    report = gpkit.diagnose(net, penalties, example, loss=loss, costs=False)
    assert report.ok, str(report)
    vector = parts[2].clone().requires_grad_()
    losses = F.cross_entropy(net(*parts[:2], vector), y, reduction="none")
    (g,) = torch.autograd.grad(losses.sum(), vector, create_graph=True)
    value = 0.5 * g.square().sum(1).mean().item()
    assert report.numbers["input_grad_norm"]["penalty"] == pytest.approx(value, rel=1e-9)
    grads = torch.autograd.grad(losses.mean(), list(net.parameters()))
    value = 0.5 * norm(grads) ** 2
    assert report.numbers["weight_grad_norm"]["penalty"] == pytest.approx(value, rel=1e-9)


def test_what_is_no_example():
    net, penalty = nn.Linear(N, 1), gpkit.r1()
    with pytest.raises(TypeError, match="takes the samples once"):
        gpkit.diagnose(net, penalty)
    with pytest.raises(TypeError, match="got 4 entries"):
        gpkit.diagnose(net, penalty, (1, 2, 3, 4))
    with pytest.raises(TypeError, match="must be tensors; got a str"):
        gpkit.diagnose(net, penalty, "x")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        gpkit.diagnose(torch.tanh, penalty, torch.randn(2, N))
    with pytest.raises(ValueError, match="must be a number > 0"):
        gpkit.diagnose(net, penalty, torch.randn(2, N), share=0)
    with pytest.raises(ValueError, match="needs a penalty; got none"):
        gpkit.diagnose(net, [], torch.randn(2, N))
