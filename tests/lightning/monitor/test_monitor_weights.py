"""The monitor's norms of the weights' gradients are those of plain torch in float64."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from modules import SGD, Plain
from monitored import BATCHES, approx, fit, loader, norms_of_samples, seen_by_hand, size
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

import gpkit


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_total_by_default_at_every_step(net, returns):
    logged = fit(Plain(copy.deepcopy(net), returns=returns), gpkit.GradientNormMonitor())
    (found,) = logged.columns("grad_norm/weight")
    assert found == approx(seen_by_hand(net, lambda net, x, y: size(*net.parameters())))
    assert logged.names() == {"loss", "grad_norm/weight"}


@pytest.mark.parametrize(("accumulate", "clip"), [(2, None), (1, 0.05), (3, 0.05)])
def test_of_the_accumulated_gradient_before_clipping(net, accumulate, clip):
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    logged = fit(Plain(copy.deepcopy(net)), gpkit.GradientNormMonitor(), **options)
    true = seen_by_hand(
        net, lambda net, x, y: size(*net.parameters()), accumulate=accumulate, clip=clip
    )
    assert logged.columns("grad_norm/weight") == [approx(true)]


def test_by_layer(net):
    logged = fit(Plain(copy.deepcopy(net)), gpkit.GradientNormMonitor("layer"))
    names = ["net.backbone.0", "net.head"]
    layers = [lambda net: net.backbone[0], lambda net: net.head]
    for name, layer in zip(names, layers, strict=True):
        true = seen_by_hand(net, lambda net, x, y, layer=layer: size(*layer(net).parameters()))
        assert logged.columns(f"grad_norm/weight/{name}") == [approx(true)]
    true = seen_by_hand(net, lambda net, x, y: size(*net.parameters()))
    assert logged.columns("grad_norm/weight") == [approx(true)]
    parts = {f"grad_norm/weight/{name}" for name in names}
    assert logged.names() == {"loss", "grad_norm/weight"} | parts


def test_by_group(net):
    class Grouped(Plain):
        def configure_optimizers(self):
            head = {"params": self.net.head.parameters(), "name": "head"}
            return SGD([{"params": self.net.backbone.parameters()}, head])

    logged = fit(Grouped(copy.deepcopy(net)), gpkit.GradientNormMonitor("group"))
    for name, part in [("group_0", "backbone"), ("head", "head")]:
        true = seen_by_hand(
            net, lambda net, x, y, part=part: size(*getattr(net, part).parameters())
        )
        assert logged.columns(f"grad_norm/weight/{name}") == [approx(true)]
    assert len(logged.names()) == 4  # the loss, all weights, and the two groups


def test_a_parameter_without_gradient_is_zero_and_a_frozen_one_is_left_out(net):
    module = Plain(copy.deepcopy(net))
    module.unused, module.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    logged = fit(module, gpkit.GradientNormMonitor("layer"), max_epochs=1)
    assert logged.columns("grad_norm/weight/unused") == [[0.0] * BATCHES]
    assert "grad_norm/weight/frozen" not in logged.names()
    true = seen_by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=1)
    assert logged.columns("grad_norm/weight") == [approx(true)]


def test_tied_parameters_count_once(net):
    module = Plain(copy.deepcopy(net))
    module.again = nn.Linear(8, 3, bias=False)
    module.again.weight = module.net.head.weight
    logged = fit(module, gpkit.GradientNormMonitor("layer"), max_epochs=1)
    true = seen_by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=1)
    assert logged.columns("grad_norm/weight") == [approx(true)]
    true = seen_by_hand(net, lambda net, x, y: size(net.head.weight), epochs=1)
    assert logged.columns("grad_norm/weight/again") == [approx(true)]


def test_sparse_gradients():
    class Tokens(Plain):
        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([1, 1, 2])).pow(2).sum()

    table = nn.Embedding(4, 2, sparse=True)
    true = (
        (2 * torch.stack([2 * table.weight[1], table.weight[2]])).norm().item()
    )  # 1 is there twice
    sgd = partial(torch.optim.SGD, lr=0.1)
    logged = fit(Tokens(table, optimizer=sgd), gpkit.GradientNormMonitor("layer"), max_steps=1)
    assert logged.columns("grad_norm/weight") == [approx([true])]


@pytest.mark.parametrize("fused", [False, True])
def test_unscaled_under_a_gradient_scaler(net, fused):
    """Fused optimisers unscale in their step: the gradients that are read are scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = partial(torch.optim.Adam, lr=0.01, fused=fused)
    module = Plain(copy.deepcopy(net).float(), optimizer=optimizer)
    monitor = gpkit.GradientNormMonitor(inputs="net", activations="net.backbone")
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    logged = fit(module, monitor, plugins=plugins, max_epochs=1, batches=loader(torch.float32))
    expected = {
        "weight": lambda net, x, y: size(*net.parameters()),
        "input": lambda net, x, y: norms_of_samples(net, x, y, "input").mean().item(),
        "activation/net.backbone": lambda net, x, y: (
            norms_of_samples(net, x, y, "activation").mean().item()
        ),
    }
    for name, look in expected.items():
        true = seen_by_hand(net, look, partial(torch.optim.Adam, lr=0.01), epochs=1)
        assert logged.columns(f"grad_norm/{name}") == [pytest.approx(true, rel=0.01)]  # fp16


def test_an_overflow_is_logged_as_it_is(net):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    monitor = gpkit.GradientNormMonitor("layer", inputs="net", histogram_every_n_epochs=1)
    logged = fit(
        Plain(copy.deepcopy(net).float()),
        monitor,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        batches=loader(torch.float32),
        max_steps=1,
    )
    for values in logged.columns("grad_norm/weight", "grad_norm/input"):
        assert not torch.tensor(values).isfinite().any()


def test_the_optimisers_gradient_includes_penalties(net):
    penalty = gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(0.5))
    logged = fit(Plain(copy.deepcopy(net)), gpkit.GradientNormMonitor(), penalty, max_steps=1)
    x, y = next(iter(loader()))
    loss, params = F.cross_entropy(net(x), y), list(net.parameters())
    grads = torch.autograd.grad(loss, params, create_graph=True)
    (loss + 0.5 * sum(g.square().sum() for g in grads)).backward()
    assert logged.columns("grad_norm/weight") == [approx([size(*params)])]
    plain = torch.cat([g.flatten() for g in grads]).norm().item()
    assert logged.columns("penalty/weight_grad_norm/norm") == [approx([plain])]
