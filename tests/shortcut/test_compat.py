"""What a repeated call takes of torch's private API is there, and is what the public one gives."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from gpkit.shortcut import compat


def test_the_parts_of_a_module():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    hook = net.register_forward_hook(lambda *_: None)
    children, owned, buffers, hooks, before = compat.parts_of(net)
    assert (children, owned, buffers, before) == (dict(net.named_children()), {}, {}, {})
    assert [*hooks] == [hook.id]
    _, owned, buffers, *_ = compat.parts_of(net[1])
    assert owned == dict(net[1].named_parameters())
    assert buffers == dict(net[1].named_buffers())


def test_the_hooks_of_every_module():
    assert not any(compat.GLOBAL_HOOKS)
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        assert any(compat.GLOBAL_HOOKS)
        handle.remove()
    assert not any(compat.GLOBAL_HOOKS)


def test_the_engine_gives_what_grad_gives(monkeypatch):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y, times = torch.tanh(x @ w), torch.arange(1.0, 5.0, dtype=torch.float64)
    assert compat.RUN is not compat._by_grad, "torch.autograd.Variable._execution_engine is gone"
    (expected,) = torch.autograd.grad(y, x, times, create_graph=True)
    for run in (compat.RUN, compat._by_grad):
        monkeypatch.setattr(compat, "RUN", run)
        g = compat.gradient(y, x, times)
        assert torch.equal(g, expected)
        slopes = [
            torch.autograd.grad(t.square().sum(), w, retain_graph=True) for t in (g, expected)
        ]
        assert torch.equal(*[s for (s,) in slopes])
        assert x.grad is w.grad is None
        assert compat.gradient(y, torch.zeros(2, requires_grad=True), times) is None


def test_the_engine_gives_the_gradients_of_several(monkeypatch):
    w, b, other = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(((w * b).tanh()).sum(), [w, b])
    for run in (compat.RUN, compat._by_grad):
        monkeypatch.setattr(compat, "RUN", run)
        y = (w * b).tanh().sum()
        *found, none = compat.gradients(y, (w, b, other), torch.ones_like(y))
        assert none is w.grad is None
        assert all(map(torch.equal, found, expected))
        with pytest.raises(RuntimeError, match="second time"):  # the graph is freed
            torch.autograd.grad(y, w)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, times):
        ctx.times = times
        return x * times

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.times, None


def test_a_function_is_applied():
    assert hasattr(compat._BASE, "apply"), "the base class of torch.autograd.Function has no apply"
    x = torch.tensor(3.0, requires_grad=True)
    y = compat.applied(Doubled, x, 2.0)
    assert y.item() == 6
    assert torch.autograd.grad(y, x) == (2.0,)
