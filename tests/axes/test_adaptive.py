"""Weights that adapt: closed forms, convergence to what was asked for, and resumed runs."""

import copy
import json
import math

import oracles
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import gpkit


def ridge(weight, steps, *, lr=0.1):
    """Descend (w - 3)²/2 + λ w², whose penalty's norm is |w|: w = 3 / (1 + 2λ) at rest."""
    w, x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.ones(4, 1).double()
    penalty = gpkit.input_grad_norm(weight=weight)
    for _ in range(steps):
        loss = (w - 3).square() / 2
        term = penalty(lambda x, w=w: w * x[:, 0], x)
        if hasattr(weight, "measure"):
            weight.measure(loss, term, [w])
        (g,) = torch.autograd.grad(loss + term, w)
        with torch.no_grad():
            w -= lr * g
    return w.item(), weight(steps)


def test_target_norm_arrives():
    # catches a sign, and an error that is taken of n² instead of n
    w, weight = ridge(gpkit.target_norm(1.5, weight=0.01, rate=0.05), 800)
    assert w == pytest.approx(1.5, rel=1e-6)
    assert weight == pytest.approx(0.5, rel=1e-6)


def test_gradient_share_arrives():
    # at rest |λ 2w| = |w - 3|, so a share of less than one leaves w moving: hold w still instead
    w, weight = ridge(gpkit.gradient_share(0.1, weight=50.0, every=7), 30, lr=0.0)
    assert w == 2
    assert weight == pytest.approx(0.1 * 1 / 4, rel=1e-12)  # share |w - 3| / |2w|


def test_target_norm_closed_form_once_a_step():
    # catches a correction for every micro-batch, and one that the running step already sees
    weight = gpkit.target_norm(2.0, weight=3.0, rate=0.5)
    weight.observe(torch.tensor([1.0, 3.0]), step=0)
    weight.observe(torch.tensor([4.0, 4.0]), step=0)
    assert weight(0) == 3
    assert weight(1) == weight(9) == pytest.approx(3 * math.sqrt(3 / 2))
    weight.observe(torch.tensor([200.0]), step=1)  # the error is clipped to 1
    assert weight(1) == pytest.approx(3 * math.sqrt(3 / 2))
    assert weight(2) == pytest.approx(3 * math.sqrt(3 / 2 * math.e))
    weight.observe(torch.zeros(3), step=2)
    assert weight(3) == pytest.approx(3 * math.sqrt(3 / 2))
    weight.observe(torch.tensor([math.inf]), step=3)  # an overflow teaches nothing
    assert weight(4) == weight(3)


def test_weight_stays_within_its_bounds():
    weight = gpkit.target_norm(1.0, rate=1.0, low=0.5, high=2.0)
    for step, norm in enumerate((9.0, 9.0, 0.0, 0.0, 0.0)):
        weight.observe(torch.tensor([norm]), step=step)
    assert weight(0) == 0.5
    weight = gpkit.target_norm(1.0, rate=1.0, low=0.5, high=2.0)
    weight.observe(torch.tensor([9.0]), step=0)
    assert weight(1) == 2


def classifier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3


def test_gradient_share_measures_the_ratio():
    net, x, y = classifier()
    weight = gpkit.gradient_share(0.3, weight=2.0, every=4, rate=0.5)
    penalty = gpkit.weight_grad_norm(weight=weight)

    def risk(params):
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    def norm(of):
        grads = torch.func.grad(of)({n: p.detach() for n, p in net.named_parameters()})
        return torch.cat([g.flatten() for g in grads.values()]).norm().item()

    unit = norm(lambda p: oracles.weight_norm(risk, p).square().sum()) / norm(risk)  # u
    expected, step_up = 2.0, math.log(1.5)
    for step in range(13):
        # ‖∇L‖² over ‖∇L‖ is as many times as large: far off at step 4, and by 1.5 at step 8
        factor = 1.0 if step < 4 else 8.0 if step < 8 else 12.0
        loss = factor * F.cross_entropy(net(x), y)
        term = penalty(loss, net.parameters(), step=step)
        weight.measure(loss, term, net.parameters(), step=step)
        weight.measure(loss, term, net.parameters(), step=step)  # a second micro-batch
        assert weight(step) == pytest.approx(expected, rel=1e-12)
        if step in (0, 4):
            expected = 0.3 / (factor * unit)  # taken whole
        elif step == 8:  # half of it, and the trend a third of half of that
            expected = 0.3 / (8 * unit) * math.exp(-step_up / 2 - step_up / 12)
        elif step == 12:
            left = step_up / 2 - step_up / 12  # above the level and its trend
            level, trend = step_up - left / 2, step_up / 12 + left / 12
            expected = 0.3 / (8 * unit) * math.exp(-level - trend)
        assert weight(step + 1) == pytest.approx(expected, rel=1e-12)
    assert all(p.grad is None for p in net.parameters())
    (loss + term).backward()  # the graphs are still there


@pytest.mark.parametrize("kind", ["weight", "input"])
@pytest.mark.parametrize(("scale", "start"), [(1.0, 1.0), (1e-4, 1e3), (1e-3, 1e-3)])
def test_gradient_share_holds_from_step_50_on_whatever_the_start(kind, scale, start):
    # a last layer near zero: the penalty's gradient grows by orders of magnitude as it learns
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3))
    with torch.no_grad():
        net[-1].weight *= scale
        net[-1].bias *= scale
    data = torch.randn(400, 8)
    labels = data[:, :3].argmax(1)
    weight = gpkit.gradient_share(0.1, weight=start)
    preset = gpkit.weight_grad_norm if kind == "weight" else gpkit.input_grad_norm
    penalty = preset(weight=weight)
    parameters = list(net.parameters())
    adam = torch.optim.Adam(parameters, 3e-3)

    def length(value):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).norm()

    shares = []
    for _ in range(150):
        chosen = torch.randint(0, 400, (32,))
        x = data[chosen].requires_grad_()
        losses = F.cross_entropy(net(x), labels[chosen], reduction="none")
        loss = losses.mean()
        term = penalty(loss, parameters) if kind == "weight" else penalty(losses, x)
        weight.measure(loss, term, parameters)
        shares.append((length(term) / length(loss)).log())
        adam.zero_grad()
        (loss + term).backward()
        adam.step()
    for first in range(50, 150, 20):  # the mean over a few batches: a single one is noisy
        assert torch.stack(shares[first : first + 20]).mean().exp() == pytest.approx(0.1, rel=0.3)


def observe(weight, norms, steps):
    for step in range(steps):
        weight.observe(torch.tensor([norms]), step)


@pytest.mark.parametrize(("side", "norms", "bound"), [("high", 9.0, 2e3), ("low", 0.1, 2e-3)])
def test_a_target_out_of_reach_is_said_and_does_not_wind_up(side, norms, bound):
    weight = gpkit.target_norm(1.0, weight=2.0, rate=0.2)
    with pytest.warns(UserWarning, match=rf"at its bound {side}={bound:g} for 50 steps") as said:
        observe(weight, norms, 1000)
    assert len(said) == 1
    assert weight(1000) == bound
    weight.observe(torch.tensor([1 / norms]), 1000)  # the first measurement of the other sign
    assert weight(1001) == pytest.approx(bound * math.exp(0.2 if norms < 1 else -0.2))


def test_a_lazy_penalty_has_its_share_on_average():
    net, x, y = classifier()
    weight = gpkit.gradient_share(0.3)
    penalty = gpkit.weight_grad_norm(weight=weight, every=4)
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty, gradient_norms=False)
    module.train()
    module.penalized_loss((x, y))
    term = weight(1) * gpkit.weight_grad_norm(weight=1.0)(nn.CrossEntropyLoss()(net(x), y), net)

    def length(value):
        grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).norm()

    assert float(length(term) / length(nn.CrossEntropyLoss()(net(x), y))) == pytest.approx(0.3)


def test_nothing_is_learnt_where_there_is_no_gradient():
    weight = gpkit.gradient_share(0.3)
    w = torch.ones(2, requires_grad=True)
    weight.measure(w.sum(), torch.zeros(()), [w])  # a step that `every` skips
    weight.measure(w.sum(), 0 * w.sum(), [w])
    assert weight(5) == 1


def test_evaluation_teaches_nothing():
    net, x, y = classifier()
    weight = gpkit.target_norm(1.0)
    penalty = gpkit.weight_grad_norm(weight=weight)

    def closure():
        return F.cross_entropy(net(x), y)

    penalty.terms(closure, net)
    with torch.no_grad():
        penalty(closure, net)
    assert weight(1) == weight(9) == 1
    penalty(closure, net)
    assert weight(9) != 1


def test_ranks_share_one_measurement(monkeypatch):
    # this rank measured 1, the other three 9 in all: the mean is 2.5
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(9.0))
    weight = gpkit.target_norm(1.0, rate=1.0)
    measured = torch.tensor(1.0)
    weight.record(measured, step=0)
    assert weight(1) == pytest.approx(2.5)
    assert measured == 1  # the caller's tensor is left alone


def fit(penalties, epochs, folder, ckpt_path=None):
    """Train on micro-batches, two a step, and return the module."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(20, 4)
    data = DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=4)
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalties, gradient_norms=False)
    trainer = pl.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


@pytest.mark.filterwarnings("ignore::Warning")  # of Lightning's own
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def penalties():
        return {
            "weight": gpkit.weight_grad_norm(weight=gpkit.gradient_share(0.3, every=2)),
            "input": gpkit.input_grad_norm(weight=gpkit.target_norm(0.1), every=2),
        }

    whole = fit(penalties(), 3, tmp_path)
    first = fit(penalties(), 2, tmp_path)
    resumed = fit(penalties(), 3, tmp_path, tmp_path / "2.ckpt")
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name))
        assert not torch.equal(p, first.get_parameter(name))
    states = [{n: p.state_dict() for n, p in m.penalties.items()} for m in (whole, resumed)]
    assert states[0] == states[1] == json.loads(json.dumps(states[0]))
    assert states[0]["weight"]["axes"]["weight"]["value"] != 1
    assert states[0]["input"]["axes"]["weight"]["value"] != 1
    # 5 batches make 3 steps an epoch: 9 steps, of which 0, 2, ..., 8 have acted and measured
    assert (
        states[0]["input"]["axes"]["weight"]["step"]
        == states[0]["weight"]["axes"]["weight"]["step"]
        == 8
    )


def test_a_state_without_a_schedules_own_still_loads():
    penalty = gpkit.weight_grad_norm(weight=gpkit.target_norm(1.0))
    penalty.load_state_dict({"step": 3, "draws": 2, "seed": 1})
    assert penalty.weight(3) == 1
    twin = copy.deepcopy(penalty)
    twin.weight.observe(torch.tensor([9.0]), 3)
    assert penalty.weight(4) == 1  # a copy has a state of its own


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gpkit.target_norm(0.0), r"`target_norm\(target=...\)` must be a number > 0"),
        (lambda: gpkit.target_norm(1.0, weight=0.0), r"`target_norm\(weight=...\)` must be"),
        (lambda: gpkit.target_norm(1.0, weight=9.0, high=2.0), r"at most high=2; got 9.0"),
        (
            lambda: gpkit.target_norm(1.0, rate=-1),
            r"`target_norm\(rate=...\)` must be a",
        ),
        (lambda: gpkit.gradient_share(-1), r"`gradient_share\(share=...\)` must be a number > 0"),
        (lambda: gpkit.gradient_share(0.1, every=0), r"`gradient_share\(every=...\)` must be an"),
        (lambda: gpkit.rescaled(-1.0), r"`rescaled\(schedule=...\)` must be a number >= 0"),
        (lambda: gpkit.lazy_adam(1.0, (0.9, 1.0)), r"must be two numbers below 1"),
        (lambda: gpkit.lazy_adam(1.0, every=0), r"`lazy_adam\(every=...\)` must be an integer"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
def test_a_weight_measures_gradients_of_a_compiled_loss_as_of_an_eager_one():
    x, y = torch.rand(8, 2), torch.randint(2, (8,))
    weights = []
    for compile in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        penalty = gpkit.weight_grad_norm(weight=gpkit.gradient_share(0.1))
        module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty, compile=compile)
        for _ in range(4):
            module.penalized_loss((x, y)).backward()
        weights.append(penalty.weight_at(4))
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)
    assert weights[0] != 1.0
