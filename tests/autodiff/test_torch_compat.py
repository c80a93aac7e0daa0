"""What gpkit takes of torch beside its public API is there: kernels, modules, tensors, compiling.

A test that fails here names the entry of gpkit/autodiff/compat.py that a release has changed, and
what goes wrong in gpkit without it.
"""

import subprocess
import sys

import pytest
import ranks
import torch
from releases import attention, require
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gpkit
from gpkit.autodiff import compat, graph, isolation
from gpkit.autodiff.taylor import compat as taylor
from gpkit.autodiff.taylor.directional import directional_derivative
from gpkit.autodiff.taylor.jets import RULES, Jet
from gpkit.autodiff.tracing import compat as tracing
from gpkit.hints import HINTS
from gpkit.lightning.monitor.groups import by_layer

LOUD = "nothing of gpkit can be imported, or batches are not read as they were"

SLOWER = "double_backward() takes torch.backends.cuda's way: it is right, and slower at every step"

KINDS = ["flash", "mem_efficient", "cudnn", "math"]


def penalised():
    score, weight, x = attention()
    value = gpkit.r1()(score, real=x)
    return value.detach(), *torch.autograd.grad(value, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_switch(kind):
    enabled, enable = compat.attention_switch(kind)
    public = getattr(torch.backends.cuda, f"{kind}_sdp_enabled")
    private = hasattr(torch._C, f"_get_{kind}_sdp_enabled") and enabled is not public
    require(private, "attention_switch", SLOWER)
    before = public()
    try:
        for on in (not before, before):
            enable(on)
            assert enabled() == public() == on
    finally:
        enable(before)


@pytest.mark.parametrize("gone", ["_get_flash_sdp_enabled", "_set_sdp_use_flash"])
def test_attention_switch_falls_back(gone, monkeypatch):
    with monkeypatch.context() as without:
        without.delattr(torch._C, gone)
        found = compat.attention_switch("flash")
    assert found == (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp)


def test_penalties_are_the_same_on_the_public_switches(monkeypatch):
    expected = penalised()
    with monkeypatch.context() as without:
        for kind in KINDS:
            without.delattr(torch._C, f"_set_sdp_use_{kind}")
        switches = {kind: compat.attention_switch(kind) for kind in KINDS}
    monkeypatch.setattr(isolation, "FUSED", [switches[kind] for kind in KINDS[:3]])
    monkeypatch.setattr(isolation, "MATH_ENABLED", switches["math"][0])
    monkeypatch.setattr(isolation, "ENABLE_MATH", switches["math"][1])
    before = [enabled() for enabled, _ in switches.values()]
    assert all(map(torch.equal, penalised(), expected))
    assert [enabled() for enabled, _ in switches.values()] == before


RENAMED = """
import torch
C, public = torch._C, torch.backends.cuda
for kind in ("flash", "mem_efficient", "cudnn", "math"):
    setattr(public, f"{kind}_sdp_enabled", getattr(C, f"_get_{kind}_sdp_enabled"))
    setattr(public, f"enable_{kind}_sdp", getattr(C, f"_set_sdp_use_{kind}"))
    delattr(C, f"_get_{kind}_sdp_enabled")
    delattr(C, f"_set_sdp_use_{kind}")
del C._disabled_torch_function_impl
import gpkit
x = torch.randn(2, 3, 4)
def score(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x).sum((1, 2))
gpkit.r1()(score, real=x)
gpkit.directional_derivative(torch.sin, x, x, 3)
assert all(enabled() for enabled in (public.flash_sdp_enabled, public.math_sdp_enabled))
"""


def test_gpkit_is_imported_and_works_where_they_are_renamed():
    done = subprocess.run([sys.executable, "-c", RENAMED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_buffers_of():
    net = nn.Sequential(nn.BatchNorm1d(3))
    assert compat.buffers_of(net) == {}
    own = compat.buffers_of(net[0])
    assert own == dict(net[0].named_buffers())
    own["running_mean"] = other = torch.ones(3)
    require(net[0].running_mean is other, "buffers_of", "penalties write to the net's own buffers")
    net[0].register_buffer("running_mean", None)
    assert own["running_mean"] is None


def test_children_parameters_and_nodes():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    own = compat.children_of(net), compat.parameters_of(net[0])
    true = dict(net.named_children()), dict(net[0].named_parameters())
    require(own == true, "children_of or parameters_of", "a net that has changed is taken as known")
    x, before = torch.ones(1, 3), compat.nodes_made()
    y = net(x)
    made = compat.nodes_made() - before
    graphs = list(graph.nodes(y))  # with two leaves, whose nodes are of the parameters
    require(made == len(graphs) - 2, "nodes_made", "another graph of a net is taken as known")


def outputs_of_data_parallel_nets(rank):
    """Whether the output of a net, static or not, is known for what it is; then on step two."""
    found = []
    for static in (True, False):
        net = DistributedDataParallel(nn.Linear(2, 1), static_graph=static)
        for _ in range(2):
            loss = net(torch.ones(3, 2)).sum()
            found.append(any(map(compat.is_static_ddp, graph.nodes(loss))))
            loss.backward()
    return found


@pytest.mark.ddp
def test_is_static_ddp():
    assert ranks.run(outputs_of_data_parallel_nets) == [[True, False, False, False]] * 2


def test_is_compiled():
    without = "a compiled net is watched inside, and compiled anew at every penalty"
    net = nn.Linear(2, 2)
    assert not compat.is_compiled(net)
    require(compat.is_compiled(torch.compile(net, backend="eager")), "is_compiled", without)
    assert not compat.is_compiled(net)
    net.compile(backend="eager")
    require(compat.is_compiled(net), "is_compiled", without)


def test_is_compiled_function():
    assert not compat.is_compiled_function(penalised)
    require(
        compat.is_compiled_function(torch.compile(penalised, backend="eager")),
        "is_compiled_function",
        "a compiled training step is not run uncompiled where a penalty asks for it",
    )


@pytest.mark.parametrize("inner", [lambda net: net, nn.Sequential])
def test_uncompiled_name(inner):
    plain = nn.Sequential(inner(nn.Linear(2, 2)))
    compiled = nn.Sequential(torch.compile(inner(nn.Linear(2, 2)), backend="eager"))
    (true,), (found,) = ([name for name, _ in by_layer(net)] for net in (plain, compiled))
    require(found == true, "uncompiled_name", "norms of a compiled net are logged as another's")
    names = [name for name, _ in compiled.named_modules()]
    assert any(compat.uncompiled_name(name) != name for name in names)


def test_write_count():
    x = torch.zeros(3)
    before = compat.write_count(x)
    x[1:].add_(1)
    require(
        compat.write_count(x) == before + 1,
        "write_count",
        "a training step that writes to its batch is run again on another batch without a word",
    )
    assert compat.write_count(x + 1) == 0


def test_keeps_graph(monkeypatch):
    told = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            told.append(compat.keeps_graph())
            return 2 * grad

    y = Double.apply(torch.ones((), requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    without = "a step by finite differences copies the gradient that it hands out"
    require(told == [True, False], "keeps_graph", without)
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    assert compat.keeps_graph()


@pytest.mark.parametrize("fused", [True, False])
def test_unscales_in_its_step(fused):
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)], fused=fused)
    require(
        compat.unscales_in_its_step(optimizer) is fused,
        "unscales_in_its_step",
        "the norms of a fused optimiser in float16 are logged with the scale in them",
    )


def test_trees():
    batch = {"x": (2, [torch.ones(3)]), "n": None}
    leaves = compat.tree_leaves(batch)
    require(leaves[0] == 2 and leaves[1] is batch["x"][1][0], "tree_leaves", LOUD)
    doubled = compat.tree_map_only(int, lambda n: 2 * n, batch)
    require(doubled["x"][0] == 4 and doubled["x"][1][0] is leaves[1], "tree_map_only", LOUD)
    require(compat.tree_map(type, batch)["x"] == (int, [torch.Tensor]), "tree_map", LOUD)


def test_tracing_gradients():
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < (2, 13):
        assert not tracing.traces_gradients()
        pytest.skip("this torch traces no gradient")
    require(tracing.traces_gradients(), "traces_gradients", "compile=True is refused")
    config = torch._dynamo.config
    before = config.trace_autograd_ops, config.recompile_limit
    with tracing.tracing_gradients():
        assert (config.trace_autograd_ops, config.recompile_limit) == (True, 16)
    assert (config.trace_autograd_ops, config.recompile_limit) == before


def test_a_torch_that_traces_no_gradient_is_refused(monkeypatch):
    monkeypatch.setattr("gpkit.compiling.entry.traces_gradients", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"needs a version of torch that can trace gradients.*compile=False"
    ):
        gpkit.PenalizedModule(nn.Linear(2, 1), gpkit.r1(), compile=True)


def test_the_option_that_a_hint_names():
    import torch._functorch.config as config

    require(
        "torch._functorch.config.donated_buffer" in HINTS["donated buffers"][1]
        and hasattr(config, "donated_buffer"),
        "(the hint on donated buffers in hints.py)",
        "gpkit tells to set an option that is not there",
    )


def test_wrapper_tensor():
    like = torch.zeros(2, 3).double().t()
    jet = taylor.wrapper_tensor(Jet, like)
    found = type(jet), jet.shape, jet.stride(), jet.dtype, jet.device
    assert found == (Jet, like.shape, like.stride(), like.dtype, like.device)


def test_no_torch_function():
    require(
        taylor.no_torch_function() is torch._C._disabled_torch_function_impl,
        "no_torch_function",
        "Taylor mode runs each operation through Python once more, right and slower",
    )


def test_no_torch_function_falls_back(monkeypatch):
    x = torch.randn(4, 3).double()
    expected = directional_derivative(torch.sin, x, x, 3)
    with monkeypatch.context() as without:
        without.delattr(torch._C, "_disabled_torch_function_impl")
        other = taylor.no_torch_function()
    calls = []

    def counted(cls, func, *args, **kwargs):
        calls.append(func)
        return other.__func__(cls, func, *args, **kwargs)

    monkeypatch.setattr(Jet, "__torch_function__", classmethod(counted))
    assert torch.equal(directional_derivative(torch.sin, x, x, 3), expected)
    assert calls


@pytest.mark.parametrize("name", RULES)
def test_torch_has_the_operation_of_a_rule(name):
    require(
        hasattr(torch.ops.aten, name),
        f"(the rule {name!r} of Taylor mode)",
        "the rule never answers, and Taylor mode refuses what it was for",
    )
