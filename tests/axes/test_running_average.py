"""The running average at the centre of a form: its values, gradient, state, and all ranks."""

import pickle

import pytest
import ranks
import torch
from torch import nn

import gpkit


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
