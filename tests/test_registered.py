"""`register_penalty`: the state of a penalty is in the checkpoint of the module that holds it."""

import copy
import io

import pytest
import torch
from torch import nn

import gpkit


class Trained(nn.Module):
    """A module with a penalty of its own, on a submodule too."""

    def __init__(self, penalty, name="slope"):
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(3, 1)
        gpkit.register_penalty(self, name, penalty)


def penalty():
    """With a step count, drawn numbers, and a running average."""
    average = gpkit.two_sided(gpkit.running_average(0.5))
    return gpkit.GradientPenalty(form=average, at=gpkit.perturb(0.5), every=2, seed=1)


def curved(x):
    return x.pow(3).sum(1)


def trained(module, steps=3):
    x = torch.arange(12.0, dtype=torch.float64).reshape(4, 3) / 10
    return [module.slope(curved, x).item() for _ in range(steps)]


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "as a part"])
def test_a_fresh_module_goes_on_where_the_saved_one_was(inside):
    """Through a file, strictly, and only with plain values in it."""
    first = Trained(penalty())
    whole = nn.ModuleDict({"critic": first}) if inside else first
    trained(first)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    after = trained(first)
    assert len(set(after)) == 3 - 1  # one step is skipped: zero; the others differ
    fresh = Trained(penalty())
    target = nn.ModuleDict({"critic": fresh}) if inside else fresh
    assert trained(Trained(penalty())) != after
    state = torch.load(file, weights_only=True)
    assert not any(target.load_state_dict(state, strict=True))
    assert trained(fresh) == after
    assert set(state) == set(whole.state_dict())


def test_a_state_from_before_it_was_registered():
    module = Trained(penalty())
    trained(module)
    step = module.slope.step
    old = {k: v for k, v in module.state_dict().items() if k != "slope"}
    assert not any(module.load_state_dict(old, strict=True))
    assert module.slope.step == step


def test_a_sum():
    first, second = (Trained(gpkit.sum({"a": gpkit.r1(every=2), "b": penalty()})) for _ in range(2))
    trained(first)
    second.load_state_dict(first.state_dict())
    assert [p.step for p in second.slope.values()] == [3, 3]


def test_a_copy_saves_its_own_penalty():
    module = Trained(penalty())
    other = copy.deepcopy(module)
    trained(other)
    assert other.state_dict()["slope"]["step"] == 3
    assert module.state_dict()["slope"]["step"] == 0
    module.load_state_dict(other.state_dict())
    assert module.slope.step == 3


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"takes a penalty, or a gpkit\.sum; got <function"):
        Trained(gpkit.r1)
    with pytest.raises(ValueError, match="the name of a new attribute of the Trained; got 'score'"):
        Trained(penalty(), "score")
