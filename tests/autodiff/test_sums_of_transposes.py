"""Graphs of torch's own compiler sum what is transposed before it is, and stay right."""

import pytest
import torch
from compiling import needs_compiler
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import gpkit
from gpkit.autodiff.tracing.compat import for_steps, sums_of_transposes


def names(graph):
    return [node.target.__name__ for node in graph.nodes if node.op == "call_function"]


def traced_of(function, *args):
    return make_fx(function, tracing_mode="fake")(*args)  # as the compiler's own graphs


def after(function, *args):
    """Return the graph of a function after the pass, which must compute the same as before."""
    traced = traced_of(function, *args)
    sums_of_transposes()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    expected, found = function(*args), traced(*args)
    torch.testing.assert_close(found, expected)
    return traced.graph


def swapped(x, *order):
    return torch.ops.aten.permute.default(x, order)


def test_a_sum_of_transposes_is_the_transpose_of_a_sum():
    parts = torch.randn(3, 4, 3).unbind(0)
    two = after(lambda a, b: swapped(a, 1, 0) + swapped(b, 1, 0), *parts[:2])
    assert names(two) == ["add.Tensor", "permute.default"]
    three = after(
        lambda *abc: sum((swapped(x, 1, 0) for x in abc[1:]), swapped(abc[0], 1, 0)), *parts
    )
    assert names(three)[-1] == "permute.default"
    assert sorted(names(three)) == ["add.Tensor", "add.Tensor", "permute.default"]


OTHERS = {
    "one transpose": lambda a, b: swapped(a, 1, 0, 2) + b,
    "other orders": lambda a, b: swapped(a, 1, 0, 2) + swapped(b, 0, 2, 1),
    "a factor": lambda a, b: torch.add(swapped(a, 1, 0, 2), swapped(b, 1, 0, 2), alpha=2),
    "a number": lambda a, b: swapped(a, 1, 0, 2) + 1.0,
    "used elsewhere": lambda a, b: (
        (x := swapped(a, 1, 0, 2)) + swapped(b, 1, 0, 2),
        x.exp(),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_are_left_alone(name):
    a, b = torch.randn(2, 3, 3, 3).unbind(0)
    function = OTHERS[name]
    before = names(traced_of(function, a, b).graph)
    assert names(after(function, a, b)) == before


def test_options_of_the_user_come_first():
    own = object()
    assert for_steps({})["options"]["joint_custom_pre_pass"] is sums_of_transposes()
    given = {"options": {"joint_custom_pre_pass": own}}
    assert for_steps(given)["options"]["joint_custom_pre_pass"] is own
    assert "joint_custom_pre_pass" not in for_steps({"backend": "aot_eager"})["options"]


@needs_compiler
def test_a_compiled_penalty_has_such_sums(monkeypatch):
    found, kind = [], type(sums_of_transposes())
    run = kind.__call__

    def counting(self, graph):
        before = len(graph.nodes)
        run(self, graph)
        found.append(before - len(graph.nodes))

    monkeypatch.setattr(kind, "__call__", counting)
    net, x = nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, 3)), torch.randn(4, 2)
    y, penalty = torch.tensor([0, 1, 2, 0]), gpkit.weight_grad_norm()
    loss = lambda x, y: penalty.with_loss(lambda: F.cross_entropy(net(x), y), net)  # noqa: E731
    compiled = gpkit.compile(loss, measure=False)
    with torch._inductor.config.patch(force_disable_caches=True):  # a cached graph has no pass
        for _ in range(2):
            net.zero_grad()
            compiled(x, y).backward()
    assert compiled.obstacle is None
    assert sum(found) >= 1  # of two transposes one is left
    grads = torch.autograd.grad(loss(x, y), net.parameters())
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)
