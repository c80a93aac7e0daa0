"""GradientNormMonitor: it logs what plain torch has in float64, and training is the same."""

import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

import gpkit
from gpkit.lightning.monitor.findings import findings_of_strategy
from tests.lightning.callback.test_callback_compiled import Graphs

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
    module.again = nn.Linear(6, 3, bias=False)
    module.again.weight = module.net.head.weight
    logged = fit(module, gpkit.GradientNormMonitor("layer"), max_epochs=1)
    true = by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=1)
    assert logged.steps("grad_norm/weight") == [approx(true)]
    true = by_hand(net, lambda net, x, y: size(net.head.weight), epochs=1)
    assert logged.steps("grad_norm/weight/again") == [approx(true)]


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


def test_of_the_last_micro_batch(net, monkeypatch):
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or grad(*a, **k))
    monitor = gpkit.GradientNormMonitor(inputs="net")
    logged = fit(Plain(copy.deepcopy(net)), monitor, accumulate_grad_batches=2)
    assert len(passes) == 1 + 4  # the very first, and the last of each optimiser step
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
    assert passes.count("norm") == 3 * (1 + 4 + 1)  # the input, four parameters, all


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


@pytest.mark.parametrize("asked", [{"inputs": "net"}, {"activations": "net.backbone"}], ids=str)
def test_a_compiled_net_runs_compiled_on_the_steps_that_are_not_logged(net, asked):
    """Of six steps the first is looked into, and every second; hooks that stay on would compile."""
    torch._dynamo.reset()
    graphs = Graphs()
    net.compile(backend=graphs)
    fit(Plain(net), gpkit.GradientNormMonitor(**asked), log_every_n_steps=2)
    assert (graphs.compiled, graphs.run) == (1, 2)


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


# Validation.


def validation(net, batches=BATCHES):
    """The mean norms of the batches."""
    net, rows = copy.deepcopy(net), []
    for x, y in loader():
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        parts = net.parameters(), net.head.parameters(), net.backbone[0].parameters()
        where = ("input", "activation")
        slopes = [norms_of_samples(net, x, y, w).mean().item() for w in where]
        rows.append([*(size(*part) for part in parts), *slopes])
    return torch.tensor(rows).mean(0).tolist()


NAMES = [
    "val/grad_norm/weight",
    "val/grad_norm/weight/net.head",
    "val/grad_norm/weight/net.backbone.0",
    "val/grad_norm/input",
    "val/grad_norm/activation/net.backbone",
]
ALL = {"inputs": "net", "activations": "net.backbone", "validation": True}


class Count(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x):
        self.seen.add_(len(x))

    def compute(self):
        return self.seen


class Measured(Validated):
    """A metric and a buffer; inference mode leaves what cannot be written to outside of it."""

    def __init__(self, net, **kinds):
        super().__init__(net, **kinds)
        self.count = Count()
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def validation_step(self, batch, batch_idx):
        assert torch.is_grad_enabled() == self.expected
        assert not torch.is_inference_mode_enabled() or not self.expected
        self.mean.add_(batch[0].mean(0).detach())
        output = super().validation_step(batch, batch_idx)
        self.count.update(batch[0])
        self.log("val/count", self.count)
        return output

    def on_validation_end(self):
        self.mean = self.mean.clone()

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        loss = outputs["loss"] if self.returns == "dict" else outputs
        assert not loss.requires_grad


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_validation_within_a_fit(net, returns):
    module = Measured(copy.deepcopy(net), returns=returns)
    module.expected = True
    optimizer = partial(torch.optim.SGD, lr=0.0)
    module.make_optimizer = optimizer
    logged = fit(module, gpkit.GradientNormMonitor("layer", **ALL), max_epochs=1)
    assert logged.steps(*NAMES) == [[approx(v)] for v in validation(net)]
    assert logged.steps("val/count") == [[float(BATCHES * B)]]
    assert "validation_step" not in module.__dict__
    assert all(p.grad is None for p in module.parameters())


def test_validation_alone_again_and_after_inference_mode(net):
    module = Measured(copy.deepcopy(net))
    for monitors in ([], [gpkit.GradientNormMonitor("layer", **ALL)], []):
        module.expected = bool(monitors)
        trainer = pl.Trainer(logger=False, callbacks=monitors, **QUIET)
        (found,) = trainer.validate(module, loader(), verbose=False)
        assert found["val/count"] == BATCHES * B
        if monitors:
            assert [found[name] for name in NAMES] == approx(validation(net))
        assert set(found) == {"val/count", *(NAMES if monitors else [])}
    true = 3 * data().tensors[0].mean(0) * BATCHES
    torch.testing.assert_close(module.mean, true)


def test_no_validation_unless_asked_for(net):
    module = Measured(copy.deepcopy(net))
    module.expected = False
    logged = fit(module, gpkit.GradientNormMonitor(inputs="net"), max_epochs=1)
    assert not [name for name in logged.names() if name.startswith("val/grad")]


@pytest.mark.parametrize(
    ("given", "said"), [(None, "is None"), (torch.zeros(()), "has no graph")], ids=str
)
def test_validation_without_a_loss_is_refused(net, given, said):
    class Silent(Validated):
        def validation_step(self, batch, batch_idx):
            return given

    module = Silent(copy.deepcopy(net))
    with pytest.raises(ValueError, match=f"the loss that validation_step returns {said}: return"):
        fit(module, gpkit.GradientNormMonitor(validation=True))
    assert "validation_step" not in module.__dict__


# Training is the same.


class Noisy(Plain):
    """Batch statistics, dropout, and a number of its own from the stream."""

    def __init__(self, manual=False):
        torch.manual_seed(0)
        net = Net()
        net.backbone.append(nn.BatchNorm1d(6)).append(nn.Dropout(0.5))
        super().__init__(net)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss((x + 0.1 * torch.randn_like(x), y))
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    validation_step = Validated.validation_step


def everything(**options):
    looks = {"inputs": "net", "activations": ["net.backbone", "net.backbone.2"]}
    return gpkit.GradientNormMonitor("layer", **looks, validation=True, **options)


WAYS = {
    "32": {},
    "bf16": {"precision": "bf16-mixed"},
    "16": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "manual": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_for_bit_the_same(way, tmp_path):
    ends = []
    for monitored in (False, True):
        options = {k: v() if callable(v) else v for k, v in WAYS[way].items()}
        which = {"manual_backward": 0} if way == "manual" else {}
        monitors = [everything(**which)] if monitored else []
        module = Noisy(manual=way == "manual")
        torch.manual_seed(1)
        batches = loader(torch.float32)
        logger = TensorBoardLogger(tmp_path)
        trainer = pl.Trainer(logger=logger, callbacks=monitors, max_epochs=3, **QUIET | options)
        trainer.fit(module, batches, batches)
        momenta = [s["momentum_buffer"] for s in trainer.optimizers[0].state.values()]
        ends.append([*module.state_dict().values(), *momenta, torch.get_rng_state()])
        assert ("grad_norm/input" in trainer.callback_metrics) == monitored
    assert len(ends[0]) == len(ends[1])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


# Histograms.


def histograms(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    return {name: events.Histograms(name) for name in events.Tags()["histograms"]}


@pytest.mark.parametrize("every", [0, 2])
def test_histograms(net, tmp_path, every):
    monitor = gpkit.GradientNormMonitor("layer", **ALL, histogram_every_n_epochs=every)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = Validated(copy.deepcopy(net))
    fit(module, monitor, logger=logger, max_epochs=3)
    found = histograms(tmp_path)
    if not every:
        assert not found
        return
    events = EventAccumulator(str(tmp_path)).Reload()
    true = by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=3)
    assert [e.value for e in events.Scalars("grad_norm/weight")] == approx(true)
    samples = by_hand(net, lambda net, x, y: norms_of_samples(net, x, y, "input"), epochs=3)
    first, last = found["grad_norm/input/histogram"]
    assert (first.step, last.step) == (BATCHES, 3 * BATCHES)
    for one, true in [(first, samples[:BATCHES]), (last, samples[2 * BATCHES :])]:
        value, true = one.histogram_value, torch.cat(true)
        assert value.num == BATCHES * B
        assert value.sum == approx(true.sum().item())
        assert value.max == approx(true.max().item())

    def entries(net, x, y):
        return torch.cat([p.grad.flatten() for p in net.head.parameters()])

    first, last = found["grad/weight/net.head/histogram"]
    assert (first.step, last.step) == (0, 2 * BATCHES)
    seen = by_hand(net, entries, epochs=3)
    for one, true in [(first, seen[0]), (last, seen[2 * BATCHES])]:
        assert one.histogram_value.num == len(true)
        assert one.histogram_value.sum_squares == approx(true.square().sum().item())
    weights = {f"grad/weight/{name}/histogram" for name in ["net.head", "net.backbone.0"]}
    samples = {f"grad_norm/{n}/histogram" for n in ["input", "activation/net.backbone"]}
    assert set(found) == weights | samples | {f"val/{name}" for name in samples}
    assert [h.histogram_value.num for h in found["val/grad_norm/input/histogram"]] == [12, 12]


def test_histograms_leave_out_what_is_not_finite(net, tmp_path):
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            factor = torch.tensor([1.0, float("inf"), 1.0, float("nan")], dtype=x.dtype)
            return F.cross_entropy(self.net(x) * factor[:, None], y, reduction="none")[::2].mean()

    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitor = gpkit.GradientNormMonitor("layer", inputs="net")
    fit(Broken(copy.deepcopy(net)), monitor, logger=logger, max_steps=1)
    found = histograms(tmp_path)
    assert set(found) == {"grad_norm/input/histogram"}  # no gradient of a weight is finite
    assert found["grad_norm/input/histogram"][0].histogram_value.num == 2


# Refusals.


REFUSED = {
    "there is no submodule 'net.bakbone' \\(did you mean 'net.backbone'\\?\\); there are 'net'": {
        "inputs": "net.bakbone"
    },
    "there is no submodule 'nett'.*there is no submodule 'hed'": {
        "inputs": "nett",
        "activations": ["hed"],
    },
    "training_step does not call the submodule 'unused': name one that it calls": {
        "inputs": "unused"
    },
    "training_step does not call the submodule 'unused': name one": {"activations": "unused"},
    "calls the submodule 'net.again' 2 times: name one that is called once": {
        "inputs": "net.again"
    },
    "the input of the submodule 'net.embed' is torch.int64, which has no gradient": {
        "inputs": "net.embed"
    },
    "the output of the submodule 'net.single' must have samples": {"activations": "net.single"},
    "`manual_backward=...` is for manual optimisation; leave it out": {"manual_backward": 0},
}


@pytest.mark.parametrize("said", REFUSED)
def test_refusals_before_the_first_step(said):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.again = nn.Embedding(3, 5), nn.Tanh()
            self.backbone, self.single = nn.Linear(5, 3), nn.Identity()

        def forward(self, x):
            h = self.backbone(self.again(self.again(self.embed(x.argmax(1) % 3))))
            return h * self.single(h.mean())

    module = Plain(Odd())
    module.unused = nn.Linear(1, 1)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=said):
        fit(module, gpkit.GradientNormMonitor(**REFUSED[said]), log_every_n_steps=2)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("kind", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_whose_gradients_are_not_the_parameters(kind):
    strategy = type(kind, (), {})()
    (said,) = findings_of_strategy(strategy, reads=True, differentiates=False)
    assert f"{kind} keeps pieces of gradients" in said
    assert not list(findings_of_strategy(strategy, reads=False, differentiates=False))


def test_manual_optimisation_must_say_which_backward(net):
    with pytest.raises(ValueError, match="optimises manually: say which of the manual_backward"):
        fit(Manual(net), gpkit.GradientNormMonitor(inputs="net"))


def test_a_penalized_module_logs_its_own(net):
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"under the same names: .*gradient_norms=False"):
        fit(gpkit.PenalizedModule(net, loss), gpkit.GradientNormMonitor())
    module = gpkit.PenalizedModule(copy.deepcopy(net), loss, gradient_norms=False, optimizer=SGD)
    logged = fit(module, gpkit.GradientNormMonitor())
    true = by_hand(net, lambda net, x, y: size(*net.parameters()))
    assert logged.steps("grad_norm/weight") == [approx(true)]


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (
            partial(gpkit.GradientNormMonitor, "layers"),
            ValueError,
            r"`weights=...` must be one of .* got 'layers' \(did you mean 'layer'\?\)",
        ),
        (
            partial(gpkit.GradientNormMonitor, inputs=[nn.Linear(1, 1)]),
            TypeError,
            "`inputs=...` must be names of submodules, such as 'backbone'; got Linear",
        ),
        (
            partial(gpkit.GradientNormMonitor, histogram_every_n_epochs=-1),
            ValueError,
            "`histogram_every_n_epochs=...` must be an integer >= 0; got -1",
        ),
        (
            partial(gpkit.GradientNormMonitor, manual_backward=True),
            ValueError,
            "`manual_backward=...` must be an integer >= 0; got True",
        ),
    ],
)
def test_wrong_arguments(made, error, said):
    with pytest.raises(error, match=said):
        made()


# The module is given back.


@pytest.mark.parametrize("first", ["monitor", "penalty"])
@pytest.mark.parametrize("own", [False, True])
def test_the_module_is_given_back_after_an_exception_and_fits_again(net, first, own):
    class Failing(Validated):
        fails = True

        def on_train_batch_end(self, *args):
            if self.fails:
                raise RuntimeError("stop")

    def callbacks():
        penalty = gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(0.1))
        both = [gpkit.GradientNormMonitor(**ALL), penalty]
        return both if first == "monitor" else both[::-1]

    module = Failing(copy.deepcopy(net))
    if own:  # a method of the object's own
        module.training_step = partial(Failing.training_step, module)
    before = dict(module.__dict__)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, *callbacks())
    changed = {"training_step", "validation_step", "manual_backward"}
    assert {k: v for k, v in module.__dict__.items() if k in changed} == {
        k: v for k, v in before.items() if k in changed
    }
    module.fails = False
    logged = fit(module, *callbacks(), max_steps=1)
    assert {"grad_norm/input", "penalty/weight_grad_norm"} <= logged.names()
    assert {k: v for k, v in module.__dict__.items() if k in changed} == {
        k: v for k, v in before.items() if k in changed
    }


def test_the_other_lightning(net, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import TensorBoardLogger as Other

    class Module(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return SGD(self.parameters())

    logger = Other(tmp_path, name="", version="")
    monitor = gpkit.GradientNormMonitor(**ALL)
    trainer = lightning.Trainer(logger=logger, callbacks=[monitor], max_epochs=1, **QUIET)
    trainer.fit(Module(copy.deepcopy(net)), loader(), loader())
    true = by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=1)
    assert trainer.callback_metrics["grad_norm/weight"].item() == approx(true[-1])
    assert {"grad_norm/input", "val/grad_norm/input"} <= set(trainer.callback_metrics)
    assert "grad_norm/input/histogram" in histograms(tmp_path)


# Two processes.


STRATEGIES = {
    "ddp": DDPStrategy,
    "static_graph": partial(DDPStrategy, static_graph=True),
    "sharded": partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1),
    "unmonitored": DDPStrategy,
}


def distributed(rank):
    """Train on every second sample with each strategy; return what was logged, and the weights."""
    x, y = data().tensors
    mine = DataLoader(TensorDataset(x[rank::2], y[rank::2]), B)
    ends = {}
    for name in STRATEGIES:
        torch.manual_seed(0)
        net = Net().double()
        sharded = name == "sharded"
        module = Sharded(net) if sharded else Validated(net)
        monitor = gpkit.GradientNormMonitor("layer", **({} if sharded else ALL))
        trainer = on_two(name, *[monitor] * (name != "unmonitored"))
        trainer.fit(module, mine, mine)
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        ends[name] = logged, [whole(p).detach() for p in net.parameters()]
    trainer = on_two("sharded", gpkit.GradientNormMonitor(inputs="net"))
    with pytest.raises(ValueError, match="gathers parameters for one backward pass a step"):
        trainer.fit(Sharded(Net()), mine)
    return ends


def on_two(name, *monitors):
    options = {"devices": 2, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    options |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    strategy = STRATEGIES[name]()
    return pl.Trainer(logger=False, strategy=strategy, callbacks=list(monitors), **QUIET, **options)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Sharded(Plain):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return ranks.run(distributed, tmp_path_factory.mktemp("ranks"))


def halves():
    """The first batch of each rank."""
    x, y = data().tensors
    return [(x[rank::2][:B], y[rank::2][:B]) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "static_graph", "sharded"])
def test_of_the_gradient_averaged_over_processes(net, both, strategy):
    sum(F.cross_entropy(net(x), y) / 2 for x, y in halves()).backward()
    for known in both:
        logged, _ = known[strategy]
        assert logged["grad_norm/weight"] == approx(size(*net.parameters()))
        assert logged["grad_norm/weight/net.head"] == approx(size(*net.head.parameters()))


@pytest.mark.parametrize("strategy", ["ddp", "static_graph"])
def test_means_over_the_samples_of_all_processes(net, both, strategy):
    trained = copy.deepcopy(net)
    with torch.no_grad():
        for p, end in zip(trained.parameters(), both[0][strategy][1], strict=True):
            p.copy_(end)
    for prefix, at in [("grad_norm", net), ("val/grad_norm", trained)]:
        for name, where in [("input", "input"), ("activation/net.backbone", "activation")]:
            slopes = [norms_of_samples(at, x, y, where).mean() for x, y in halves()]
            for known in both:
                found = known[strategy][0][f"{prefix}/{name}"]
                assert found == approx(torch.stack(slopes).mean().item())
    lengths = []
    for x, y in halves():  # at validation every batch has a gradient of its own
        trained.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        lengths.append(size(*trained.parameters()))
    assert both[0][strategy][0]["val/grad_norm/weight"] == approx(sum(lengths) / 2)


@pytest.mark.parametrize("strategy", ["ddp", "static_graph"])
def test_processes_train_as_without(both, strategy):
    for known in both:
        for a, b in zip(known[strategy][1], known["unmonitored"][1], strict=True):
            assert torch.equal(a, b)
