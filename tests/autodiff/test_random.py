"""The streams of random numbers of the CPU and of any accelerator are seeded and given back."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.random import random_state, seeded, set_random_state

CPU = torch.device("cpu")
DEVICES = {"xpu:1": (2, 0), "mps": (1, 0), "mtia": (2, 1)}  # how many there are, the current one


class Generator(torch.Generator):
    """A generator of any device, on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Accelerator:
    """Stands in for torch.xpu and the like: a stream for each device, none seeded by its number."""

    def __init__(self, count, current):
        self.streams = [Generator().manual_seed(100 + i) for i in range(count)]
        self.current = current

    def of(self, device):
        return self.streams[self.current if device.index is None else device.index]

    def get_rng_state(self, device):
        return self.of(device).get_state()

    def set_rng_state(self, state, device):
        self.of(device).set_state(state)

    def dropout(self, device):
        return torch.rand(3, generator=self.of(device))


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    device = torch.device(request.param)
    importlib.import_module("torch._dynamo")  # optimisers import it, and it asks the accelerators
    monkeypatch.setattr(torch, device.type, Accelerator(*DEVICES[request.param]))
    monkeypatch.setattr(torch, "Generator", Generator)
    return device


def states(device):
    return [torch.get_rng_state(), *(s.get_state() for s in getattr(torch, device.type).streams)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_accelerator_draws_from_the_seed_and_has_its_stream_back(device):
    own, before = getattr(torch, device.type), states(device)
    draws = []
    for seed in (5, 5, 6):
        with seeded(seed, device):
            draws.append((torch.rand(3), own.dropout(device)))
        assert same(states(device), before)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(draw, expected) for draw in (*draws[0], *draws[1]))
    assert not any(torch.equal(draw, expected) for draw in draws[2])


def test_another_device_of_the_kind_is_left_alone(device):
    streams = getattr(torch, device.type).streams
    others = [s for s in streams if s is not getattr(torch, device.type).of(device)]
    before = [s.get_state() for s in others]
    with seeded(5, device):
        assert same([s.get_state() for s in others], before)


def test_a_state_is_drawn_from_again(device):
    own, state = getattr(torch, device.type), random_state(device)
    first = torch.rand(3), own.dropout(device)
    moved = states(device)
    with seeded(state, device):
        again = torch.rand(3), own.dropout(device)
    assert same(first, again)
    assert same(states(device), moved)
    set_random_state(state, device)
    assert same((torch.rand(3), own.dropout(device)), first)


def test_streams_come_back_after_an_error(device):
    def broken():
        getattr(torch, device.type).dropout(device)
        raise KeyError("no")

    before = states(device)
    with pytest.raises(KeyError, match="no"), isolated(nn.Identity(), 0, device):
        broken()
    assert same(states(device), before)


def test_figures_of_a_gan_leave_the_streams_alone(device):
    from gpkit.lightning.gan.figures.callback import undisturbed

    before = states(device)
    module = SimpleNamespace(device=device, modules=lambda: [], eval=lambda: None)
    with undisturbed(module):
        torch.rand(3), getattr(torch, device.type).dropout(device)
    assert same(states(device), before)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_on_the_cpu_it_is_a_fork_and_a_seed(seed):
    def draws():
        return torch.randn(3), torch.rand(5).double(), torch.randperm(20), torch.randn(40)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        expected = draws()
    torch.randn(1)  # leaves the second number of a pair behind, for the next draw
    before = torch.get_rng_state()
    with seeded(seed, CPU):
        found = draws()
    assert same(found, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(random_state(CPU)) == 1


def test_a_device_without_numbers_has_no_stream():
    before = torch.get_rng_state()
    with seeded(0, torch.device("meta")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["cuda", "mps", "mtia", "xpu"])
def test_torch_takes_the_device_of_a_stream(kind):
    """What stands in for an accelerator above is called as torch's own is."""
    module, device = getattr(torch, kind), torch.device(kind)
    inspect.signature(module.get_rng_state).bind(device)
    inspect.signature(module.set_rng_state).bind(torch.get_rng_state(), device)
