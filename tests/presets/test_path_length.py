"""Path lengths of a generator, and the running average that is the centre of their form."""

import copy
import json
import math
import pickle
from collections import UserList

import oracles
import pytest
import ranks
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


def slope(decay, form=gpkit.two_sided, **options):
    """Return a penalty on a function of unequal slopes, one for each sample."""
    return gpkit.GradientPenalty(form=form(gpkit.running_average(decay, **options)))


def test_the_average_of_a_sequence():
    # a ← d a + (1 - d) mean n, and then (n - a)²
    penalty, a = slope(0.75), 0.0
    for slopes in ([1.0, 3.0], [0.5, 4.5], [2.0, 8.0]):
        s = torch.tensor(slopes, dtype=torch.float64, requires_grad=True)
        a = 0.75 * a + 0.25 * sum(slopes) / 2
        value = penalty(lambda x, s=s: s * x[:, 0], torch.zeros(2, 1, dtype=torch.float64))
        assert value.item() == pytest.approx(sum((n - a) ** 2 for n in slopes) / 2, rel=1e-12)
        (gradient,) = torch.autograd.grad(value, s)
        torch.testing.assert_close(gradient, s.detach() - a)  # 2 (n - a) / 2: a is a constant
        assert penalty.form.center.value == pytest.approx(a, rel=1e-12)


@pytest.mark.parametrize("form", [gpkit.two_sided, gpkit.one_sided, gpkit.absolute])
@pytest.mark.parametrize("use", ["constant", "graph", "before"])
def test_what_the_centre_of_a_call_is(form, use):
    # catches a use that only two_sided knows, and an update before the old average is taken
    function = {
        gpkit.two_sided: lambda d: d.square(),
        gpkit.one_sided: lambda d: d.relu().square(),
        gpkit.absolute: lambda d: d.abs(),
    }[form]
    penalty, a = slope(0.75, form, use=use), 0.0
    for slopes in ([1.0, 3.0], [0.5, 4.5], [2.0, 8.0]):
        s = torch.tensor(slopes, dtype=torch.float64, requires_grad=True)
        new = 0.75 * a + 0.25 * s.mean()
        c = {"constant": new.detach(), "graph": new, "before": a}[use]
        true = function(s - c).mean()
        (expected,) = torch.autograd.grad(true, s)
        value = penalty(lambda x, s=s: s * x[:, 0], torch.zeros(2, 1, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(value, s)
        assert value.item() == pytest.approx(true.item(), rel=1e-12)
        torch.testing.assert_close(gradient, expected)
        a = new.item()
        assert penalty.form.center.value == pytest.approx(a, rel=1e-12)


def test_evaluation_leaves_the_average():
    penalty, x = slope(0.5), torch.ones(2, 1)
    with torch.no_grad():
        assert penalty(lambda x: 2 * x[:, 0], x).item() == 4.0
    assert penalty.form.center.value == 0.0


def test_one_sided_about_an_average():
    value = slope(0.5, gpkit.one_sided)(
        lambda x: x[:, 0] * torch.tensor([1.0, 3.0]), torch.ones(2, 1)
    )
    assert value.item() == (3 - 1) ** 2 / 2  # a = ½·2


def test_terms_leave_the_average():
    penalty, x = slope(0.5), torch.ones(2, 1)
    f = lambda x: x[:, 0] * torch.tensor([1.0, 3.0])  # noqa: E731
    assert penalty.terms(f, x).values.tolist() == [1.0, 9.0]  # a = 0
    assert penalty(f, x).item() == 2.0  # a = 1
    assert penalty.terms(f, x).values.tolist() == [0.0, 4.0]
    assert penalty.state_dict()["axes"] == {"form": {"value": 1.0}}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_skipped_step_does_not_spoil_the_average(bad):
    # with a gradient scaler an overflow makes one step infinite, and that step is skipped
    penalty, x = slope(0.5), torch.ones(2, 1)
    penalty(lambda x: 2 * x[:, 0], x)
    assert not penalty(lambda x: bad * x[:, 0], x).isfinite()
    assert penalty.form.center.value == 1.0
    assert penalty(lambda x: 3 * x[:, 0], x).item() == 1.0  # a = ½·1 + ½·3


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


def test_only_an_axis_with_a_state_is_saved():
    class Doubling:
        factor = 1.0

        def __call__(self, step):
            return self.factor

        def state_dict(self):
            return {"factor": self.factor}

        def load_state_dict(self, state):
            self.factor = state["factor"]

    numbers = {"step", "draws", "seed"}
    assert gpkit.wgan_gp().state_dict().keys() == numbers
    module = nn.Linear(2, 1)  # its owner saves it
    assert gpkit.GradientPenalty(of=module).state_dict().keys() == numbers
    weight = Doubling()
    weight.factor = 4.0
    state = gpkit.GradientPenalty(weight=weight).state_dict()
    assert state["axes"] == {"weight": {"factor": 4.0}}
    other = gpkit.GradientPenalty(weight=Doubling())
    other.load_state_dict(state)
    assert other.weight_at(0) == 4.0
    old = slope(0.5)
    old.load_state_dict({"step": 1, "draws": 1, "seed": 1})  # of a penalty that had no average
    assert old.form.center.value == 0.0


def of_rank(rank):
    penalty = slope(0.5)
    slopes = torch.tensor([[1.0, 1.0], [4.0, 6.0]][rank])
    value = penalty(lambda x: slopes * x[:, 0], torch.zeros(2, 1))
    return penalty.form.center.value, value.item()


@pytest.mark.ddp
def test_the_mean_is_over_all_ranks():
    # catches ranks whose centres drift apart
    a = 0.5 * (1 + 1 + 4 + 6) / 4
    assert ranks.run(of_rank) == [(a, (1 - a) ** 2), (a, ((4 - a) ** 2 + (6 - a) ** 2) / 2)]


def gradient_of_rank(rank):
    slopes = torch.tensor([[1.0, 1.5], [4.0, 6.0]][rank], dtype=torch.float64, requires_grad=True)
    penalty = slope(0.5, use="graph")
    x = torch.zeros(2, 1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(penalty(lambda x: slopes * x[:, 0], x), slopes)
    return grad.tolist()


@pytest.mark.ddp
def test_the_gradient_through_the_average_is_over_all_ranks():
    # the mean over ranks, as DDP takes it, is the gradient of one process with all four samples
    slopes = torch.tensor([1.0, 1.5, 4.0, 6.0], dtype=torch.float64, requires_grad=True)
    whole = (slopes - 0.5 * slopes.mean()).square().mean()
    (true,) = torch.autograd.grad(whole, slopes)
    halves = ranks.run(gradient_of_rank)
    assert [g / 2 for half in halves for g in half] == pytest.approx(true.tolist(), rel=1e-12)


def test_is_a_value():
    center = gpkit.running_average(0.9, 2.0, use="before")
    assert pickle.loads(pickle.dumps(center)) == center
    assert repr(center) == "running_average(decay=0.9, value=2.0, use='before')"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gpkit.running_average(1.5), r"must be a number in \[0, 1\]; got 1.5"),
        (
            lambda: gpkit.running_average(-1),
            r"`running_average\(decay=...\)` must be a number >= 0",
        ),
        (lambda: gpkit.running_average(use="new"), r"`running_average\(use=...\)` must be one of"),
        (lambda: gpkit.running_average(0.5, "a"), r"`running_average\(value=...\)` must be a numb"),
        (lambda: gpkit.path_length(order=2), r"the l2 norm of a first derivative; got order=2"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()
