"""Path lengths of a generator."""

import copy
import json
import math
from collections import UserList

import oracles
import pytest
import torch
from compare import gradients, relative_error
from scenes import B
from torch import nn
from torch.func import functional_call

import gpkit


class Generator(nn.Sequential):
    """Latents [B, *S] to images [B, 2, 3, 4]; it records the vector y of the product Jᵀy."""

    def __init__(self, latents):
        super().__init__(
            nn.Flatten(),
            nn.Linear(latents, 5),
            nn.Tanh(),
            nn.Linear(5, 24),
            nn.Unflatten(1, (2, 3, 4)),
        )
        self.double()
        self.drawn = UserList()  # a list would be put back after a pass of a penalty

    def forward(self, w):
        images = super().forward(w)
        if images.requires_grad:
            images.register_hook(lambda g: self.drawn.append(g.detach()))
        return images


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return Generator(6)


def latents(*shape):
    rng = torch.Generator().manual_seed(1)
    size = torch.tensor([0.05, 2.0, 0.5, 4.0, 1.0]).double().reshape(B, *[1] * len(shape))
    return torch.randn(B, *shape, generator=rng, dtype=torch.float64) * size


def lengths(net, params, w, y):
    """Return (mean over L of the squared lengths of the rows of Jᵀy)^½ for each sample."""
    plain = nn.Sequential(*net)
    J = oracles.derivative(lambda z: functional_call(plain, params, (z[None],))[0], 1, w)
    rows = torch.einsum("bchw,bchw...->b...", y, J).reshape(B, -1, w.shape[-1])  # [B, L, D]
    return rows.square().sum(2).mean(1).sqrt()


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
@pytest.mark.parametrize("route", ["callable", "graph"])
def test_value_and_gradient(generator, shape, route):
    # catches a sum over L, an a that is a constant, or that does not hold this call's mean
    w, decay = latents(*shape), 0.7
    penalty = gpkit.path_length(weight=2.0, decay=decay, every=1)
    z = w.clone().requires_grad_()
    found = penalty(generator, w) if route == "callable" else penalty(generator(z), z)
    y = generator.drawn[0]
    params = {n: p.detach() for n, p in generator.named_parameters()}
    a = (1 - decay) * lengths(generator, params, w, y).mean().item()

    def formula(params):
        n = lengths(generator, params, w, y)
        return 2.0 * (n - (1 - decay) * n.mean()).square().mean()

    grads, value = torch.func.grad_and_value(formula)(params)
    assert relative_error(found.detach(), value) < 1e-10
    gradient = torch.cat([g.flatten() for g in grads.values()])
    assert relative_error(gradients(found, generator), gradient) < 1e-10
    assert penalty.form.center.value == pytest.approx(a, rel=1e-12)


def test_y_is_gaussian_over_the_root_of_the_pixels(generator):
    # catches Rademacher signs, one y for all samples or channels, and a scale by H·W or by C·H·W
    penalty = gpkit.path_length(every=1, seed=0)
    for _ in range(100):
        penalty(generator, latents(6))
    del generator.drawn[1]  # of the first call, which looks whether samples depend on each other
    assert len(generator.drawn) == 100
    y = torch.stack(list(generator.drawn)) * math.sqrt(3 * 4)
    draws = y.numel()
    assert abs(y.mean()) < 4 / draws**0.5
    assert abs(y.square().mean() - 1) < 4 * (2 / draws) ** 0.5
    assert abs(y.pow(4).mean() - 3) < 4 * (96 / draws) ** 0.5
    assert y.unique().numel() == draws


def test_one_output_is_multiplied_by_a_gaussian_too():
    penalty = gpkit.path_length(every=1, seed=0)
    n = penalty.terms(lambda w: 3 * w[:, 0], torch.zeros(20_000, 2)).norms  # 3 |y|
    assert n.mean().item() == pytest.approx(3 * (2 / math.pi) ** 0.5, rel=0.02)
    assert n.square().mean().item() == pytest.approx(9, rel=0.04)


def test_zero_is_harmless(generator):
    with torch.no_grad():
        for p in generator.parameters():
            p.zero_()
    penalty = gpkit.path_length(every=1, form=gpkit.two_sided(gpkit.running_average(0.5, 1.0)))
    value = penalty(generator, latents(6))
    assert value.item() == 2 * 0.5**2  # a = ½·1 + ½·0
    assert gradients(value, generator).eq(0).all()


def test_defaults():
    penalty = gpkit.path_length()
    assert (penalty.weight, penalty.every, penalty.form.center.decay) == (2.0, 4, 0.99)


def test_lazy_calls_alone_enter_the_average(generator):
    penalty, w = gpkit.path_length(decay=0.5, seed=0), latents(6)
    values = []
    for _ in range(9):
        penalty(generator, w)
        values.append(penalty.form.center.value)
    assert len(set(values)) == 3
    assert values[0] == values[3] != values[4] == values[7] != values[8]


def test_the_gradient_of_published_code():
    # w ↦ θ w: n = θ |y|, a = 0.01 n, so d/dθ (0.99 n)² = 2·0.99²·n²/θ; with a constant 2·0.99·n²/θ
    x = torch.ones(1, 1, dtype=torch.float64)
    uses = {"graph": 0.99**2, "constant": 0.99, "before": 1.0}
    for use, factor in {None: 0.99**2, **uses}.items():
        form = {} if use is None else {"form": gpkit.two_sided(gpkit.running_average(use=use))}
        theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        penalty = gpkit.path_length(weight=1.0, every=1, seed=0, **form)
        n = penalty.terms(lambda w, theta=theta: theta * w, x).norms.item()
        value = penalty(lambda w, theta=theta: theta * w, x)
        kept = 1.0 if use == "before" else 0.99
        assert value.item() == pytest.approx((kept * n) ** 2, rel=1e-12)
        (gradient,) = torch.autograd.grad(value, theta)
        assert gradient.item() == pytest.approx(2 * factor * n**2 / 2, rel=1e-12)
        assert penalty.form.center.value == pytest.approx(0.01 * n, rel=1e-12)


def run(penalty, generator, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        w = latents(6)
        (generator(w).square().mean() + penalty(generator, w)).backward()
        optimizer.step()


def test_a_resumed_run_is_the_uninterrupted_one():
    # bit for bit, from a state of plain numbers, in a process of another global seed
    torch.manual_seed(0)
    generators = [Generator(6)]
    generators.append(copy.deepcopy(generators[0]))
    runs = [(g, torch.optim.SGD(g.parameters(), lr=0.01)) for g in generators]
    whole, first = gpkit.path_length(seed=3), gpkit.path_length(seed=3)
    run(whole, *runs[0], 13)
    run(first, *runs[1], 6)
    state = json.loads(json.dumps(first.state_dict()))
    torch.manual_seed(9)
    second = gpkit.path_length()
    second.load_state_dict(state)
    run(second, *runs[1], 7)
    for p, q in zip(generators[0].parameters(), generators[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert second.state_dict() == whole.state_dict()
    assert second.form.center.value != 0


def test_saved_with_a_module_and_with_a_sum():
    torch.manual_seed(0)
    make = lambda: gpkit.sum({"path_length": {"every": 1}, "jacobian": {}})  # noqa: E731
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), make())
    module.penalized_loss((torch.randn(B, 3), torch.tensor([0, 1, 1, 0, 1])))
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    average = module.penalties["path_length"].form.center.value
    assert average > 0
    assert checkpoint["gpkit_penalties"]["path_length"]["axes"] == {"form": {"value": average}}
    resumed = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), make())
    resumed.on_load_checkpoint(json.loads(json.dumps(checkpoint)))
    assert resumed.penalties["path_length"].form.center.value == average
    both, again = make(), make()
    both(net, torch.randn(B, 3))
    again.load_state_dict(both.state_dict())
    assert again.parts["path_length"].form.center == both.parts["path_length"].form.center
