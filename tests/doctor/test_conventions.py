"""Where public code has another strength: the weight that the doctor names gives its numbers."""

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
    return net, torch.randn(B, N, dtype=DOUBLE)


def notes(net, penalty, example, **options):
    report = gpkit.diagnose(net, penalty, example, costs=False, **options)
    return [f.why + ": " + f.fix for f in report.findings if f.code == "convention"]


def squares(net, x):
    """Return the squared slope of each sample's score."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x)
    return g.square().sum(1)


def test_critics():
    """The authors' R1, and public code of AMP, are λ mean n²."""
    net, x = setting()
    published = 10 * squares(net, x).mean()
    torch.testing.assert_close(gpkit.r1(weight=2 * 10)(net, real=x).detach(), published)
    for penalty in (gpkit.r1(), gpkit.r2(), gpkit.amp()):
        (said,) = notes(net, penalty, x)
        assert "weight=2·λ" in said
    assert notes(net, gpkit.zero_gp(), x) == []


def test_two_forwards():
    """λ mean (D(x) - D(x + σε))² of a linear D is λσ²‖w‖² on average, and R1 is γ/2 ‖w‖²."""
    w, x, gamma, sigma = torch.tensor([3.0, 4.0]), torch.zeros(400_000, 2), 2.0, 0.1
    weight = gamma / (2 * sigma**2)
    value = gpkit.approximate_r1(weight, sigma=sigma, seed=0)(lambda x: x @ w, real=x)
    assert value.item() == pytest.approx(gamma / 2 * 25, rel=0.01)
    net, x = setting()
    (said,) = notes(net, gpkit.approximate_r1(), x)
    assert "weight=γ/(2·σ²)" in said


def test_the_gradient_of_the_mean_loss():
    net, x = setting(outputs=3)
    y = torch.arange(B) % 3
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net(z), y), z)
    published = 0.7 * g.square().sum()  # of the whole batch
    losses = lambda x: F.cross_entropy(net(x), y, reduction="none")  # noqa: E731
    torch.testing.assert_close(gpkit.input_grad_norm(0.7 / B)(losses, x).detach(), published)
    (said,) = notes(
        net, gpkit.input_grad_norm(), (x, y), loss=nn.CrossEntropyLoss(reduction="none")
    )
    assert f"λ/{B} for a batch of {B}" in said


def test_forces():
    net, x = setting()
    z, target = x.clone().requires_grad_(), torch.randn(B, N, dtype=DOUBLE)
    (g,) = torch.autograd.grad(net(z).sum(), z)
    published = F.mse_loss(g, target)
    penalty = gpkit.sobolev(1.0, form=gpkit.squared(scale=1 / N))
    torch.testing.assert_close(penalty(net, x, target=target).detach(), published)
    (said,) = notes(net, gpkit.sobolev(), x, target=target)
    assert f"form=gpkit.squared(scale=1/{N})" in said


def test_environments():
    """Fishr's formula is the sum over the entries of the classifier."""
    net, x = setting(outputs=3)
    y, env = torch.arange(B) % 3, torch.arange(B) % 2
    each = []
    for one, label in zip(x, y, strict=True):
        loss = F.cross_entropy(net(one[None]), label[None])
        grads = torch.autograd.grad(loss, list(net[2].parameters()))
        each.append(torch.cat([g.flatten() for g in grads]))
    each = torch.stack(each)
    variances = torch.stack([each[env == e].var(0, correction=0) for e in (0, 1)])
    published = (variances - variances.mean(0)).square().sum(1).mean()
    entries = 5 * 3 + 3
    penalty = gpkit.fishr(float(entries), ema=0.0)
    value = penalty(lambda: gpkit.features(net, x), y, env).detach()
    torch.testing.assert_close(value, published)
    mean, sum_ = notes(net, gpkit.fishr(1.0), (x, y, env))
    assert "reduce='sum'" in mean
    assert f"the paper's λ is weight={entries}·λ here" in sum_
