"""compile=True: the penalised loss as one graph equals the eager one."""

import copy
import math
from functools import partial

import pytest
import ranks
import torch
from compiling import losses_and_gradients
from torch import nn

import gpkit

pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("graphs_alone")]


def test_equals_eager_step_by_step():
    """A weight with a schedule, and one in the inputs: an interpolate of a GAN, and at the data."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    penalties = {
        "weight": gpkit.weight_grad_norm(weight=gpkit.warmup(0.3, steps=2), match="*.weight"),
        "input": gpkit.input_grad_norm(weight=0.7),
        "moved": gpkit.jacobian(weight=0.5, at="perturb"),
    }
    x, y = torch.rand(8, 4), torch.randint(3, (8,))
    batches = [(x, y), (x.flip(0), y.flip(0)), (x, y)]
    eager, compiled = (
        gpkit.PenalizedModule(
            copy.deepcopy(net), nn.CrossEntropyLoss(), copy.deepcopy(penalties), compile=compile
        )
        for compile in (False, True)
    )
    results = [losses_and_gradients(module, batches) for module in (eager, compiled)]
    for step, pair in enumerate(zip(*results, strict=True)):
        for expected, found in zip(*pair, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=f"step {step}")
    assert compiled.compiled_loss.obstacle is None
    assert not x.requires_grad


def test_projections_are_drawn_anew_and_unbiased():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    module = gpkit.PenalizedModule(
        net, nn.MSELoss(), gpkit.jacobian(weight=2.0, seed=1), compile=True
    )
    x, y = torch.zeros(2, 4), torch.zeros(2, 3)
    base = nn.functional.mse_loss(net(x), y)
    values = torch.stack([module.penalized_loss((x, y)) - base for _ in range(400)]).detach()
    exact = net.weight.square().sum()  # (2/2) ‖W‖²
    assert values[1:].unique().numel() > 3
    assert abs(values.mean() - exact) < 5 * values.std() / 20


def test_pixels_and_the_maximum_equal_eager():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    penalties = {
        "pixel": gpkit.input_grad_norm(weight=0.7, scope="pixel", form=gpkit.norm()),
        "max": gpkit.jacobian(weight=0.5, estimator="exact", reduce="max"),
    }
    batches = [(torch.rand(3, 2, 4, 4), torch.rand(3, 2))] * 2
    eager, compiled = (
        losses_and_gradients(
            gpkit.PenalizedModule(
                copy.deepcopy(net), nn.MSELoss(), copy.deepcopy(penalties), compile=compile
            ),
            batches,
        )
        for compile in (False, True)
    )
    for expected, found in zip(eager[1], compiled[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_steers_the_norm_is_shown_the_norms():
    """log λ moves by rate · clip(log(n / target), -1, 1) at every step, with n by hand."""
    torch.manual_seed(0)
    net, target, rate, weight = nn.Linear(4, 3), 0.5, 0.7, 0.2
    penalty = gpkit.weight_grad_norm(gpkit.target_norm(target, weight=weight, rate=rate))
    module = gpkit.PenalizedModule(net, nn.MSELoss(), penalty, compile=True)
    for size in (0.3, 1.0, 3.0, 0.1, 2.0):
        x, y = size * torch.randn(6, 4), size * torch.randn(6, 3)
        loss = nn.functional.mse_loss(net(x), y)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        n = math.sqrt(sum(g.square().sum().item() for g in grads))
        found = module.penalized_loss((x, y)).item()
        assert found == pytest.approx(loss.item() + weight * n**2, rel=1e-5)
        weight *= math.exp(rate * min(1.0, max(-1.0, math.log(n / target))))


class Whole(nn.Module):
    """What DDP wraps: the penalised loss as a forward pass."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.penalized_loss(batch)


def slopes(net, *, compile):
    penalty = gpkit.jacobian(weight=0.3, estimator="exact")
    return gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty, compile=compile)


def trained_on_a_rank(rank, net, x, y):
    """Train on half of each batch under DDP, compiled; return the weights and the obstacle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        patch.setattr("gpkit.compiling.parity.faster", lambda *_: (1.0, 0.0))
        module = slopes(net, compile=True)
        ddp = nn.parallel.DistributedDataParallel(Whole(module))
        half = slice(4 * rank, 4 * rank + 4)
        train(net, ddp, x[:, half], y[:, half])
    return [p.detach() for p in net.parameters()], module.compiled_loss.obstacle


def train(net, loss, x, y):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in zip(x, y, strict=True):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


@pytest.mark.slow
def test_two_ranks_train_as_one_process():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(3, 8, 4), torch.randint(3, (3, 8))
    found = ranks.run(trained_on_a_rank, copy.deepcopy(net), x, y)
    train(net, slopes(net, compile=False).penalized_loss, x, y)
    for weights, obstacle in found:
        assert obstacle is None
        torch.testing.assert_close(weights, list(net.parameters()), rtol=1e-6, atol=1e-6)
