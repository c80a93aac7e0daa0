"""The monitor's norms of the gradients in inputs and activations, sample by sample."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from compiling import Graphs
from modules import Plain
from monitored import B, approx, fit, loader, norms_of_samples, seen_by_hand, size

import gpkit


def test_inputs_and_activations(net):
    monitor = gpkit.GradientNormMonitor(None, inputs="net", activations=["net.backbone"])
    logged = fit(Plain(copy.deepcopy(net)), monitor)
    for name, where in [("input", "input"), ("activation/net.backbone", "activation")]:
        true = seen_by_hand(
            net, lambda net, x, y, where=where: norms_of_samples(net, x, y, where).mean().item()
        )
        assert logged.columns(f"grad_norm/{name}") == [approx(true)]
    assert logged.names() == {"loss", "grad_norm/input", "grad_norm/activation/net.backbone"}


def test_several_inputs_are_named(net):
    module = Plain(copy.deepcopy(net))
    logged = fit(module, gpkit.GradientNormMonitor(inputs=["net", "net.head"]), max_steps=1)
    x, y = next(iter(loader()))
    for name, where in [("net", "input"), ("net.head", "activation")]:
        true = norms_of_samples(net, x, y, where).mean().item()
        assert logged.columns(f"grad_norm/input/{name}") == [approx([true])]


def test_the_module_itself(net):
    class Forward(Plain):
        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    logged = fit(Forward(copy.deepcopy(net)), gpkit.GradientNormMonitor(inputs=""), max_steps=1)
    x, y = next(iter(loader()))
    true = norms_of_samples(net, x, y, "input").mean().item()
    assert logged.columns("grad_norm/input") == [approx([true])]


@pytest.mark.parametrize("first", ["monitor", "penalty"])
@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_of_the_loss_without_penalties_in_either_order(net, first, estimator):
    monitor = gpkit.GradientNormMonitor(inputs="net", activations="net.backbone")
    penalty = gpkit.input_grad_norm(0.5, estimator=estimator)
    both = [monitor, gpkit.GradientPenaltyCallback(penalty, "net")]
    both = both if first == "monitor" else both[::-1]
    module = Plain(copy.deepcopy(net))
    logged = fit(module, *both, max_steps=1)
    x, y = next(iter(loader()))
    for name, where in [("input", "input"), ("activation/net.backbone", "activation")]:
        true = norms_of_samples(net, x, y, where).mean().item()
        assert logged.columns(f"grad_norm/{name}") == [approx([true])]
    assert not {"training_step", "manual_backward", "validation_step"} & set(module.__dict__)
    alone = Plain(copy.deepcopy(net))
    fit(alone, gpkit.GradientPenaltyCallback(copy.deepcopy(penalty), "net"), max_steps=1)
    for a, b in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)  # neither disturbs the other


def test_of_the_last_micro_batch(net, monkeypatch):
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    monitor = gpkit.GradientNormMonitor(inputs="net")
    logged = fit(Plain(copy.deepcopy(net)), monitor, accumulate_grad_batches=2)
    assert len(passes) == 1 + 4  # the very first, and the last of each optimiser step
    true = seen_by_hand(
        net, lambda net, x, y: norms_of_samples(net, x, y, "input").mean().item(), accumulate=2
    )
    assert logged.columns("grad_norm/input") == [approx(true)]


def test_steps_that_are_not_logged_cost_no_backward_pass(net, monkeypatch):
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    monitor = gpkit.GradientNormMonitor(inputs="net")
    logged = fit(Plain(copy.deepcopy(net)), monitor, log_every_n_steps=2)
    assert len(logged.columns("grad_norm/input")[0]) == 3  # of six
    assert len(passes) == 1 + 3  # the first step is looked into, to see that it can be


def test_a_closure_that_is_called_again_is_looked_into_once(net, monkeypatch):
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    optimizer = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    logged = fit(
        Plain(copy.deepcopy(net), optimizer=optimizer),
        gpkit.GradientNormMonitor(inputs="net"),
        max_steps=1,
    )
    x, y = next(iter(loader()))
    true = norms_of_samples(net, x, y, "input").mean().item()
    assert logged.columns("grad_norm/input") == [approx([true])]
    assert len(passes) == 1 + B  # the monitor's, and those of the line before


@pytest.mark.compiler
def test_a_compiled_net(net):
    module = Plain(torch.compile(copy.deepcopy(net), backend="eager"))
    monitor = gpkit.GradientNormMonitor("layer", inputs="net", activations="net._orig_mod.backbone")
    logged = fit(module, monitor, max_steps=2)
    look = {
        "input": lambda net, x, y: norms_of_samples(net, x, y, "input").mean().item(),
        "weight/net.head": lambda net, x, y: size(*net.head.parameters()),
        "activation/net._orig_mod.backbone": lambda net, x, y: (
            norms_of_samples(net, x, y, "activation").mean().item()
        ),
    }
    for name, one in look.items():
        assert logged.columns(f"grad_norm/{name}") == [approx(seen_by_hand(net, one)[:2])]


@pytest.mark.compiler
@pytest.mark.parametrize("asked", [{"inputs": "net"}, {"activations": "net.backbone"}], ids=str)
def test_a_compiled_net_runs_compiled_on_the_steps_that_are_not_logged(net, asked):
    """Of six steps the first is looked into, and every second; hooks that stay on would compile."""
    torch._dynamo.reset()
    graphs = Graphs()
    net.compile(backend=graphs)
    fit(Plain(net), gpkit.GradientNormMonitor(**asked), log_every_n_steps=2)
    assert (graphs.compiled, graphs.run) == (1, 2)
