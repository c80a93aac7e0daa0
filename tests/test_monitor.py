"""GradientNormMonitor: what it logs is what plain torch has in float64, and training is the same."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import gpkit

B, BATCHES = 4, 3
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
QUIET = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "log_every_n_steps": 1,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


class Plain(pl.LightningModule):
    """A module that knows nothing of gpkit."""

    def __init__(self, net, optimizer=SGD, returns="tensor"):
        super().__init__()
        self.net = net
        self.make_optimizer = optimizer
        self.returns = returns

    def loss(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        return {"loss": loss, "size": len(x)} if self.returns == "dict" else loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        return self.loss(batch)


class Record(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({k: v for k, v in metrics.items() if k != "epoch"})

    def steps(self, *names):
        """Return what was logged under these names, a list for each."""
        return [[row[name] for row in self.rows if name in row] for name in names]

    def names(self):
        return {name for row in self.rows for name in row}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def data(dtype=torch.float64, batches=BATCHES):
    rng = torch.Generator().manual_seed(1)
    size = torch.linspace(0.2, 3, batches * B, dtype=torch.float64)[:, None]  # slopes that differ
    x = size * torch.randn(batches * B, 5, generator=rng, dtype=torch.float64)
    return TensorDataset(x.to(dtype), torch.randint(3, (len(x),), generator=rng))


def loader(dtype=torch.float64):
    return DataLoader(data(dtype), B)


def fit(module, *monitors, logger=None, batches=None, **options):
    """Train, and return what was logged."""
    logger = logger or Record()
    options = {"max_epochs": 2, **QUIET, **options}
    trainer = pl.Trainer(logger=logger, callbacks=list(monitors), **options)
    val = [batches or loader()] if isinstance(module, Validated) else []
    trainer.fit(module, batches or loader(), *val)
    return logger


def by_hand(net, look, optimizer=SGD, accumulate=1, epochs=2, clip=None):
    """Train a copy of the net in plain torch; ``look(net, x, y, loss)`` at each optimiser step."""
    net = copy.deepcopy(net)
    optimizer, seen = optimizer(net.parameters()), []
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            loss = F.cross_entropy(net(x), y)
            (loss / accumulate).backward()
            if (i + 1) % accumulate and i + 1 < BATCHES:
                continue
            seen.append(look(net, x, y))
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return seen


def size(*parameters):
    """The norm of the gradients of parameters."""
    return torch.cat([p.grad.flatten() for p in parameters]).norm().item()


def norms_of_samples(net, x, y, where):
    """‖∂ℓ_i/∂z_i‖, each from a graph of its own."""
    norms = []
    for i in range(len(x)):
        z = (x if where == "input" else net.backbone(x))[i : i + 1].detach().requires_grad_()
        losses = F.cross_entropy(net(z) if where == "input" else net.head(z), y[i : i + 1])
        norms.append(torch.autograd.grad(losses, z)[0].norm())
    return torch.stack(norms)


def approx(values):
    return pytest.approx(values, rel=1e-6)  # a log has float32


# Weights.


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_total_by_default_at_every_step(net, returns):
    logged = fit(Plain(copy.deepcopy(net), returns=returns), gpkit.GradientNormMonitor())
    (found,) = logged.steps("grad_norm/weight")
    assert found == approx(by_hand(net, lambda net, x, y: size(*net.parameters())))
    assert logged.names() == {"grad_norm/weight"}


@pytest.mark.parametrize(("accumulate", "clip"), [(2, None), (1, 0.05), (3, 0.05)])
def test_of_the_accumulated_gradient_before_clipping(net, accumulate, clip):
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    logged = fit(Plain(copy.deepcopy(net)), gpkit.GradientNormMonitor(), **options)
    true = by_hand(net, lambda net, x, y: size(*net.parameters()), accumulate=accumulate, clip=clip)
    assert logged.steps("grad_norm/weight") == [approx(true)]


def test_by_layer(net):
    logged = fit(Plain(copy.deepcopy(net)), gpkit.GradientNormMonitor("layer"))
    names = ["net.backbone.0", "net.head"]
    layers = [lambda net: net.backbone[0], lambda net: net.head]
    for name, layer in zip(names, layers, strict=True):
        true = by_hand(net, lambda net, x, y, layer=layer: size(*layer(net).parameters()))
        assert logged.steps(f"grad_norm/weight/{name}") == [approx(true)]
    true = by_hand(net, lambda net, x, y: size(*net.parameters()))
    assert logged.steps("grad_norm/weight") == [approx(true)]
    assert logged.names() == {"grad_norm/weight", *(f"grad_norm/weight/{n}" for n in names)}


def test_by_group(net):
    class Grouped(Plain):
        def configure_optimizers(self):
            head = {"params": self.net.head.parameters(), "name": "head", "lr": 0.1}
            return SGD([{"params": self.net.backbone.parameters()}, head])

    logged = fit(Grouped(copy.deepcopy(net)), gpkit.GradientNormMonitor("group"))
    for name, part in [("group_0", "backbone"), ("head", "head")]:
        true = by_hand(net, lambda net, x, y, part=part: size(*getattr(net, part).parameters()))
        assert logged.steps(f"grad_norm/weight/{name}") == [approx(true)]
    assert len(logged.names()) == 3


def test_a_parameter_without_gradient_is_zero_and_a_frozen_one_is_left_out(net):
    module = Plain(copy.deepcopy(net))
    module.unused, module.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    logged = fit(module, gpkit.GradientNormMonitor("layer"), max_epochs=1)
    assert logged.steps("grad_norm/weight/unused") == [[0.0] * BATCHES]
    assert "grad_norm/weight/frozen" not in logged.names()
    true = by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=1)
    assert logged.steps("grad_norm/weight") == [approx(true)]


def test_tied_parameters_count_once(net):
    module = Plain(copy.deepcopy(net))
    module.again = module.net.head
    logged = fit(module, gpkit.GradientNormMonitor("layer"), max_epochs=1)
    true = by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=1)
    assert logged.steps("grad_norm/weight") == [approx(true)]


def test_sparse_gradients():
    class Tokens(Plain):
        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([1, 1, 2])).pow(2).sum()

    table = nn.Embedding(4, 2, sparse=True)
    true = (
        (2 * torch.stack([2 * table.weight[1], table.weight[2]])).norm().item()
    )  # 1 is there twice
    sgd = partial(torch.optim.SGD, lr=0.1)
    logged = fit(Tokens(table, sgd), gpkit.GradientNormMonitor("layer"), max_steps=1)
    assert logged.steps("grad_norm/weight") == [approx([true])]


@pytest.mark.parametrize("fused", [False, True])
def test_unscaled_under_a_gradient_scaler(net, fused):
    """Fused optimisers unscale in their step: the gradients that are read are scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = partial(torch.optim.Adam, lr=0.01, fused=fused)
    module = Plain(copy.deepcopy(net).float(), optimizer)
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
        true = by_hand(net, look, partial(torch.optim.Adam, lr=0.01), epochs=1)
        assert logged.steps(f"grad_norm/{name}") == [pytest.approx(true, rel=0.01)]  # fp16


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
    for values in logged.steps("grad_norm/weight", "grad_norm/input"):
        assert not torch.tensor(values).isfinite().any()


def test_the_optimisers_gradient_includes_penalties(net):
    penalty = gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(0.5))
    logged = fit(Plain(copy.deepcopy(net)), gpkit.GradientNormMonitor(), penalty, max_steps=1)
    x, y = next(iter(loader()))
    loss, params = F.cross_entropy(net(x), y), list(net.parameters())
    grads = torch.autograd.grad(loss, params, create_graph=True)
    (loss + 0.5 * sum(g.square().sum() for g in grads)).backward()
    assert logged.steps("grad_norm/weight") == [approx([size(*params)])]
    plain = torch.cat([g.flatten() for g in grads]).norm().item()
    assert logged.steps("penalty/weight_grad_norm/norm") == [approx([plain])]


# Inputs and activations.


def test_inputs_and_activations(net):
    monitor = gpkit.GradientNormMonitor(None, inputs="net", activations=["net.backbone"])
    logged = fit(Plain(copy.deepcopy(net)), monitor)
    for name, where in [("input", "input"), ("activation/net.backbone", "activation")]:
        true = by_hand(
            net, lambda net, x, y, where=where: norms_of_samples(net, x, y, where).mean().item()
        )
        assert logged.steps(f"grad_norm/{name}") == [approx(true)]
    assert logged.names() == {"grad_norm/input", "grad_norm/activation/net.backbone"}


def test_several_inputs_are_named(net):
    module = Plain(copy.deepcopy(net))
    logged = fit(module, gpkit.GradientNormMonitor(inputs=["net", "net.head"]), max_steps=1)
    x, y = next(iter(loader()))
    for name, where in [("net", "input"), ("net.head", "activation")]:
        true = norms_of_samples(net, x, y, where).mean().item()
        assert logged.steps(f"grad_norm/input/{name}") == [approx([true])]


def test_the_module_itself(net):
    class Forward(Plain):
        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    logged = fit(Forward(copy.deepcopy(net)), gpkit.GradientNormMonitor(inputs=""), max_steps=1)
    x, y = next(iter(loader()))
    true = norms_of_samples(net, x, y, "input").mean().item()
    assert logged.steps("grad_norm/input") == [approx([true])]


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
        assert logged.steps(f"grad_norm/{name}") == [approx([true])]
    assert not {"training_step", "manual_backward", "validation_step"} & set(module.__dict__)
    alone = Plain(copy.deepcopy(net))
    fit(alone, gpkit.GradientPenaltyCallback(copy.deepcopy(penalty), "net"), max_steps=1)
    for a, b in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)  # neither disturbs the other


def test_of_the_last_micro_batch(net):
    monitor = gpkit.GradientNormMonitor(inputs="net")
    logged = fit(Plain(copy.deepcopy(net)), monitor, accumulate_grad_batches=2)
    true = by_hand(
        net, lambda net, x, y: norms_of_samples(net, x, y, "input").mean().item(), accumulate=2
    )
    assert logged.steps("grad_norm/input") == [approx(true)]


def test_steps_that_are_not_logged_cost_nothing(net, monkeypatch):
    passes, grad, norm = [], torch.autograd.grad, torch.linalg.vector_norm
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: passes.append("grad") or grad(*a, **k)
    )
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda *a, **k: passes.append("norm") or norm(*a, **k)
    )
    monitor = gpkit.GradientNormMonitor(inputs="net")
    logged = fit(Plain(copy.deepcopy(net)), monitor, log_every_n_steps=2)
    assert len(logged.steps("grad_norm/input")[0]) == 3  # of six
    assert passes.count("grad") == 1 + 3  # the first step is looked into, to see that it can be
    assert passes.count("norm") == 3 * (1 + 4)  # the input, and four parameters


def test_a_closure_that_is_called_again_is_looked_into_once(net, monkeypatch):
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    optimizer = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    logged = fit(
        Plain(copy.deepcopy(net), optimizer), gpkit.GradientNormMonitor(inputs="net"), max_steps=1
    )
    x, y = next(iter(loader()))
    true = norms_of_samples(net, x, y, "input").mean().item()
    assert logged.steps("grad_norm/input") == [approx([true])]
    assert len(passes) == 1 + B  # the monitor's, and those of the line before


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
        assert logged.steps(f"grad_norm/{name}") == [approx(by_hand(net, one)[:2])]


# Manual optimisation.


class Manual(pl.LightningModule):
    """Two optimisers, of which the first steps twice, then the other."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        head, backbone = self.optimizers()
        for optimizer in (head, head, backbone):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(x), y))
            optimizer.step()

    def configure_optimizers(self):
        sgd = partial(torch.optim.SGD, lr=0.5)
        return [sgd(self.net.head.parameters()), sgd(self.net.backbone.parameters())]


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("penalised", [None, "first", "last"])
def test_manual_optimisation(net, which, penalised):
    module = Manual(copy.deepcopy(net))
    callbacks = [gpkit.GradientNormMonitor("group", inputs="net", manual_backward=which)]
    if penalised:
        added = gpkit.GradientPenaltyCallback(gpkit.input_grad_norm(0.5), "net", manual_backward=2)
        callbacks.insert(0 if penalised == "first" else 1, added)
    logged = fit(module, *callbacks, max_epochs=1, limit_train_batches=1)
    x, y = next(iter(loader()))
    seen, inputs = [], []
    for call, part in enumerate([net.head, net.head, net.backbone]):
        net.zero_grad()
        z = x.clone().requires_grad_()
        losses = F.cross_entropy(net(z), y, reduction="none")
        (slopes,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
        inputs.append(slopes.norm(dim=1).mean().item())
        penalty = 0.5 * slopes.square().sum(1).mean() if penalised and call == 2 else 0.0
        (losses.mean() + penalty).backward()
        seen.append(size(*part.parameters()))
        with torch.no_grad():
            for p in part.parameters():
                p -= 0.5 * p.grad
    assert logged.steps("grad_norm/input") == [approx([inputs[which]])]
    assert logged.steps("grad_norm/weight/optimizer_0/group_0") == [approx([seen[1]])]
    assert logged.steps("grad_norm/weight/optimizer_1/group_0") == [approx([seen[2]])]
    total = (seen[1] ** 2 + seen[2] ** 2) ** 0.5
    assert logged.steps("grad_norm/weight") == [approx([total])]
    assert not {"training_step", "manual_backward"} & set(module.__dict__)
