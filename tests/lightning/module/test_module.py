"""PenalizedModule under the Trainer: it trains as a hand-written loop does, and logs what is."""

import copy
from functools import partial

import oracles
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import gpkit
from gpkit.models import ViT

B, N, LR = 4, 16, 0.1  # the samples of a batch and of an epoch; the learning rate
SGD = partial(torch.optim.SGD, lr=LR, momentum=0.9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mlp(*norm, outputs=3):
    layers = nn.Linear(5, 6), *norm, nn.Tanh(), nn.Linear(6, outputs)
    return nn.Sequential(*layers).double()


def classes(n=N):
    rng = torch.Generator().manual_seed(1)
    size = torch.linspace(0.2, 3, n, dtype=torch.float64)[:, None]  # slopes that differ
    x = size * torch.randn(n, 5, generator=rng, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (n,), generator=rng))


def values(n=N):
    x, _ = classes(n).tensors
    return TensorDataset(x, x[:, :1] - x[:, 1:2] ** 2)


class Record(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({k: v for k, v in metrics.items() if k != "epoch"})

    def steps(self):
        """Return what was logged at training steps."""
        return [row for row in self.rows if "train/loss" in row]


def trainer(**options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": 2, "logger": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_model_summary": False, **defaults, **options})


def fit(net, penalty, data, loss=F.cross_entropy, options=None, **kinds):
    """Train a copy of the net and return it."""
    module = gpkit.PenalizedModule(copy.deepcopy(net), loss, penalty, optimizer=SGD, **kinds)
    trainer(**(options or {})).fit(module, DataLoader(data, B))
    return module.net


# Trained parameters. `by_hand` knows torch.autograd only.


def by_hand(net, data, penalty, loss=F.cross_entropy, accumulate=1, epochs=2):
    """Train a copy of the net; `penalty(net, x, y, losses, output, step)` is added to the loss."""
    net = copy.deepcopy(net)
    optimizer = SGD(net.parameters())
    step = 0
    for _ in range(epochs):
        for i, (x, y) in enumerate(DataLoader(data, B)):
            x.requires_grad_()
            output = net(x)
            losses = loss(output, y, reduction="none").reshape(len(x), -1).mean(1)
            total = losses.mean() + penalty(net, x, y, losses, output, step)
            (total / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    return net


def grads(y, xs):
    return torch.autograd.grad(y, xs, create_graph=True)


def weight_term(net, x, y, losses, output, step, factor=0.1):
    squares = [g.square().sum() for g in grads(losses.mean(), list(net.parameters()))]
    return factor * sum(squares)


def input_term(net, x, y, losses, output, step, factor=0.5):
    (g,) = grads(losses.sum(), x)
    return factor * g.flatten(1).square().sum(1).mean()


def squared_jacobian(net, x, y, losses, output, step):
    rows = [grads(column.sum(), x)[0] for column in output.T]
    return torch.stack(rows).square().sum((0, 2))  # [B]


def jacobian_term(*args):
    return 0.2 / 2 * squared_jacobian(*args).mean()


def slope_term(*args):
    return 2.0 * (squared_jacobian(*args).sqrt() - 0.7).square().mean()


def sample_term(net, x, y, losses, output, step):
    return sum(weight_term(net, x, y, loss, output, step) for loss in losses) / len(losses)


def on_steps(every, term):
    """Return a term on every k-th step, k times as large."""
    return lambda *args: every * term(*args) if args[-1] % every == 0 else 0.0


def rising(net, x, y, losses, output, step):
    return weight_term(net, x, y, losses, output, step, factor=0.05 * (step + 1))


def both(*args):
    return weight_term(*args) + input_term(*args)


def nothing(*args):
    return 0.0


WEIGHT = partial(gpkit.weight_grad_norm, weight=0.1)
INPUT = partial(gpkit.input_grad_norm, weight=0.5)
SLOPE = partial(gpkit.GradientPenalty, form=gpkit.two_sided(0.7), weight=2.0)
ACCUMULATE = {"accumulate_grad_batches": 2}
EQUALS = {  # penalty, the same by hand, the trainer's options
    "none": (gpkit.none, nothing, {}),
    "no penalty": (lambda: None, nothing, {}),
    "weight": (WEIGHT, weight_term, {}),
    "input": (INPUT, input_term, {}),
    "jacobian": (lambda: gpkit.jacobian(0.2, estimator="exact"), jacobian_term, {}),
    "slope": (SLOPE, slope_term, {}),
    "dict": (lambda: {"a": WEIGHT(), "b": INPUT()}, both, {}),
    "sum": (lambda: gpkit.sum({"a": WEIGHT(), "b": INPUT()}), both, {}),
    "weights of samples": (lambda: WEIGHT(scope="sample"), sample_term, {}),
    "every": (lambda: WEIGHT(every=2), on_steps(2, weight_term), {}),
    "schedule": (lambda: gpkit.weight_grad_norm(lambda t: 0.05 * (t + 1)), rising, {}),
    "accumulate": (WEIGHT, weight_term, ACCUMULATE),
    "accumulate, input": (INPUT, input_term, ACCUMULATE),
    "accumulate, every": (lambda: WEIGHT(every=3), on_steps(3, weight_term), ACCUMULATE),
    "accumulate, schedule": (
        lambda: gpkit.weight_grad_norm(lambda t: 0.05 * (t + 1)),
        rising,
        ACCUMULATE,
    ),
}


@pytest.mark.parametrize("case", EQUALS)
@pytest.mark.parametrize("task", ["classes", "values"])
def test_trains_as_a_hand_written_loop_does(case, task):
    penalty, term, options = EQUALS[case]
    data, loss, net = classes(), F.cross_entropy, mlp()
    if task == "values":
        data, loss, net = values(), F.mse_loss, mlp(outputs=1)
    found = fit(net, penalty(), data, loss, options)
    true = by_hand(net, data, term, loss, options.get("accumulate_grad_batches", 1))
    assert_same(found, true)
    if term is not nothing:
        assert not torch.allclose(found[0].weight, by_hand(net, data, nothing, loss)[0].weight)


def assert_same(found, true):
    """Compare parameters and buffers."""
    torch.testing.assert_close(found.state_dict(), true.state_dict(), rtol=1e-9, atol=1e-12)


def test_logging_changes_no_training():
    net, data = mlp(), classes()
    bare = fit(net, INPUT(), data, gradient_norms=False, histogram_every_n_epochs=0)
    assert_same(fit(net, INPUT(), data), bare)


class Witness(nn.Sequential):
    """Layers that keep a record of where they are evaluated."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return super().forward(x)


def test_interpolates_of_a_sample_and_the_one_before_it():
    net, data = Witness(*mlp(outputs=1)), values()
    penalty = gpkit.wgan_gp(weight=2.0, center=0.7)
    found = fit(net, penalty, data, F.mse_loss)
    batches, points = found.seen[::2], found.seen[1::2]
    assert len(batches) == len(points) == 8
    for x, point in zip(batches, points, strict=True):
        fake = x.roll(1, 0)
        alpha = (point - fake) / (x - fake)  # [B, 5]
        torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))  # one for all entries
        assert 0 < alpha.min() < alpha.max() < 1
        assert len(alpha[:, 0].unique()) == B  # and one for each sample
    assert not torch.allclose(batches[0] - points[0], batches[4] - points[4])  # drawn every step

    def term(net, x, y, losses, output, step):
        point = points[step].requires_grad_()
        return slope_term(net, point, y, None, net(point), step)

    assert_same(found, by_hand(Witness(*net), data, term, F.mse_loss))


@pytest.mark.parametrize("penalty", [WEIGHT, SLOPE, partial(SLOPE, at="interpolate")])
def test_batch_statistics_are_those_of_one_forward_a_step(penalty):
    net, data = mlp(nn.BatchNorm1d(6)), classes()
    module = gpkit.PenalizedModule(net, F.cross_entropy, penalty(), optimizer=partial(SGD, lr=0))
    true = copy.deepcopy(net)
    trainer().fit(module, DataLoader(data, B))
    for _ in range(2):
        for x, _y in DataLoader(data, B):
            true(x)
    assert_same(net, true)
    assert net[1].num_batches_tracked == 8


def test_batch_norm_trains_as_by_hand():
    net, data = mlp(nn.BatchNorm1d(6)), classes()
    assert_same(fit(net, WEIGHT(), data), by_hand(net, data, weight_term))


def test_frozen_parameters_stay_and_do_not_count():
    net, data = mlp(), classes()
    net[0].requires_grad_(False)

    def term(net, *args):
        return weight_term(net[2], *args)

    found = fit(net, WEIGHT(), data)
    assert_same(found, by_hand(net, data, term))
    assert torch.equal(found[0].weight, net[0].weight)


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (-1, 4)), layer, nn.Flatten(), nn.Linear(16, 3)
    )


def vit():
    return ViT((1, 4, 4), 3, dim=8, depth=1, heads=2)


@pytest.mark.parametrize(("penalty", "term"), [(WEIGHT, weight_term), (INPUT, input_term)])
@pytest.mark.parametrize("make", [encoder, vit])
def test_attention_without_dropout_trains(make, penalty, term):
    net = make().double()  # torch's fused attention, which this would take, has no double backward
    data = TensorDataset(torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3)
    with sdpa_kernel(SDPBackend.MATH):
        true = by_hand(net, data, term)
    assert_same(fit(net, penalty(), data), true)


def test_bfloat16_penalises_as_float32_does():
    net, data, record = mlp().float(), classes(), Record()
    data = TensorDataset(data.tensors[0].float(), data.tensors[1])
    fit(net, WEIGHT(), data, options={"logger": record, "precision": "bf16-mixed"})
    params = {name: p.detach() for name, p in net.named_parameters()}
    _, of_weights, of_inputs = true_norms(net, params, *next(iter(DataLoader(data, B))))
    first = record.steps()[0]
    assert first["penalty/weight_grad_norm"] == pytest.approx(
        0.1 * float(of_weights) ** 2, rel=0.05
    )
    assert first["grad_norm/input"] == pytest.approx(float(of_inputs.mean()), rel=0.05)


# What is logged.


def true_norms(net, params, x, y, loss=F.cross_entropy):
    """Return the loss, ‖∇_θ L‖ and the norms of ∇_x ℓ_i, by torch.func."""

    def risk(params, x, y):
        return loss(functional_call(net, params, (x,)), y)

    of_weights = oracles.weight_norm(lambda p: risk(p, x, y), params).squeeze()
    of_inputs = oracles.input_norms(lambda x, y: risk(params, x[None], y[None]), 1, x, y)
    return risk(params, x, y), of_weights, of_inputs


class Snapshots(pl.Callback):
    """Keep the parameters before every step."""

    def __init__(self):
        self.params = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        now = {name: p.detach().clone() for name, p in module.net.named_parameters()}
        self.params.append(now)


def plain(values):
    return {name: float(value) for name, value in values.items()}


def test_logged_values_of_training():
    net, data, record, before = mlp(), classes(), Record(), Snapshots()
    penalty = {"w": WEIGHT(), "x": INPUT(every=2)}
    fit(net, penalty, data, options={"logger": record, "callbacks": [before]})
    assert len(record.steps()) == 8
    latest = None
    for t, row in enumerate(record.steps()):
        loss, of_weights, of_inputs = true_norms(
            net, before.params[t], *[*DataLoader(data, B)][t % 4]
        )
        weight = 0.0 if t % 2 else 2 * 0.5
        latest = of_inputs.mean() if weight else latest  # Lightning keeps it on skipped steps
        true = {
            "train/loss": loss,
            "penalty/w": 0.1 * of_weights**2,
            "penalty/w/weight": 0.1,
            "penalty/w/norm": of_weights,
            "penalty/x": weight * of_inputs.square().mean(),
            "penalty/x/weight": weight,
            "penalty/x/norm": latest,
            "grad_norm/weight": of_weights,
            "grad_norm/input": of_inputs.mean(),
        }
        true["train/loss_total"] = loss + true["penalty/w"] + true["penalty/x"]
        assert row == pytest.approx(plain(true), rel=1e-6)


LOGGED = {"train/loss", "train/loss_total"}
NORMS = {"grad_norm/weight", "grad_norm/input"}


def named(*penalties):
    return {f"penalty/{name}{end}" for name in penalties for end in ("", "/weight", "/norm")}


@pytest.mark.parametrize(
    ("penalty", "options", "names"),
    [
        (None, {}, LOGGED | NORMS),
        (gpkit.none(), {}, LOGGED | NORMS | named("none") - {"penalty/none/norm"}),
        (gpkit.r1(), {"gradient_norms": False}, LOGGED | named("r1")),
        ({"a": gpkit.r1(), "b": WEIGHT()}, {}, LOGGED | NORMS | named("a", "b")),
        (
            gpkit.sum(["r1", "weight_grad_norm"]),
            {},
            LOGGED | NORMS | named("r1", "weight_grad_norm"),
        ),
    ],
    ids=["no penalty", "none", "no norms", "dict", "sum"],
)
def test_logged_names_of_training(penalty, options, names):
    record = Record()
    fit(mlp(), penalty, classes(), options={"logger": record, "max_epochs": 1}, **options)
    assert {name for row in record.rows for name in row} == names


def test_gradient_norms_are_taken_on_logged_steps_alone():
    record = Record()
    fit(mlp(), None, classes(), options={"logger": record, "log_every_n_steps": 3})
    assert [row.keys() & NORMS for row in record.steps()] == [NORMS, NORMS]  # steps 3 and 6 of 8


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("how", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("make", "loss", "metric", "outputs"),
    [(classes, nn.CrossEntropyLoss(), "acc", 3), (values, nn.MSELoss(), "mae", 1)],
    ids=["classes", "values"],
)
def test_evaluation_equals_the_oracle(how, inference, make, loss, metric, outputs):
    net, data = mlp(nn.BatchNorm1d(6), nn.Dropout(), outputs=outputs), make(10)
    module = gpkit.PenalizedModule(net, loss, WEIGHT(), optimizer=SGD)
    runner = trainer(inference_mode=inference, num_sanity_val_steps=0)
    loader, stage = DataLoader(data, B), "test" if how == "test" else "val"  # of 4, 4 and 2
    if how == "fit":
        runner.fit(module, DataLoader(make(), B), loader)
        found = {k: float(v) for k, v in runner.callback_metrics.items() if k.startswith("val")}
    else:
        (found,) = getattr(runner, how)(module, loader, verbose=False)
    net.eval()
    params = {name: p.detach() for name, p in net.named_parameters()}
    true = dict.fromkeys(["loss", metric, *NORMS], 0.0)
    for x, y in loader:
        value, of_weights, of_inputs = true_norms(net, params, x, y, loss)
        output = net(x).detach()
        counted = output.argmax(1) == y if metric == "acc" else (output - y).abs()
        means = value, counted.double().mean(), of_weights, of_inputs.mean()
        names = "loss", metric, "grad_norm/weight", "grad_norm/input"
        for name, mean in zip(names, means, strict=True):
            true[name] += float(mean) * len(x) / len(data)
    assert found == pytest.approx({f"{stage}/{name}": v for name, v in true.items()}, rel=1e-5)


def test_validation_and_test_have_metrics_of_their_own():
    net, loss = mlp(outputs=1), nn.MSELoss()
    metrics = {"mse": MeanSquaredError()}
    module = gpkit.PenalizedModule(net, loss, metrics=metrics, gradient_norms=False)
    runner = trainer()
    for data in (values(8), values(12)):
        (found,) = runner.validate(module, DataLoader(data, B), verbose=False)
        (tested,) = runner.test(module, DataLoader(data, B), verbose=False)
        true = loss(net(data.tensors[0]), data.tensors[1]).item()
        assert found == pytest.approx({"val/loss": true, "val/mse": true})
        assert tested == pytest.approx({"test/loss": true, "test/mse": true})


def crossed(logits, target):
    return F.cross_entropy(logits, target)


@pytest.mark.parametrize(
    ("loss", "output", "target", "expected"),
    [
        (nn.CrossEntropyLoss(), [[2.0, 1.0], [2.0, 1.0]], [0, 1], {"acc": 0.5}),
        (partial(F.cross_entropy, label_smoothing=0.1), [[2.0, 1.0]], [0], {"acc": 1.0}),
        (F.nll_loss, [[2.0, 1.0]], [1], {"acc": 0.0}),
        (F.cross_entropy, [[[2.0, 1.0], [1.0, 2.0]]], [[0, 0]], {"acc": 0.5}),  # [B, C, pixels]
        (nn.BCEWithLogitsLoss(), [1.0, -1.0, -1.0, 1.0], [1.0, 0.0, 1.0, 1.0], {"acc": 0.75}),
        (nn.BCEWithLogitsLoss(), [[1.0], [-1.0]], [[1.0], [1.0]], {"acc": 0.5}),
        (nn.MSELoss(), [[1.0], [2.0]], [[2.0], [4.0]], {"mae": 1.5}),
        (F.l1_loss, [1.0, 2.0], [2.0, 4.0], {"mae": 1.5}),
        (partial(F.huber_loss, delta=2.0), [1.0], [2.0], {}),
        (crossed, [[2.0, 1.0]], [0], {}),  # unknown: none
    ],
)
def test_metrics_of_a_loss(loss, output, target, expected):
    module = gpkit.PenalizedModule(nn.Identity(), loss, gradient_norms=False)
    data = TensorDataset(torch.tensor(output), torch.tensor(target))
    (found,) = trainer().test(module, DataLoader(data, B), verbose=False)
    assert found.keys() == {"test/loss", *(f"test/{name}" for name in expected)}
    assert {name: found[f"test/{name}"] for name in expected} == pytest.approx(expected)


# Losses: each sample's own, whatever the function gives.


def of_each(logits, target):
    return -logits.log_softmax(1).gather(1, target[:, None])  # [B, 1]


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
PER_SAMPLE = partial(F.cross_entropy, reduction="none")
LOSSES = {  # loss, the number that is trained on, the losses of the samples
    "module": (nn.CrossEntropyLoss(), F.cross_entropy, PER_SAMPLE),
    "function": (F.cross_entropy, F.cross_entropy, PER_SAMPLE),
    "sum": (
        nn.CrossEntropyLoss(reduction="sum"),
        partial(F.cross_entropy, reduction="sum"),
        PER_SAMPLE,
    ),
    "unreduced": (nn.CrossEntropyLoss(reduction="none"), F.cross_entropy, PER_SAMPLE),
    "partial": (
        partial(F.cross_entropy, label_smoothing=0.3),
        partial(F.cross_entropy, label_smoothing=0.3),
        partial(PER_SAMPLE, label_smoothing=0.3),
    ),
    "class weights": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        partial(F.cross_entropy, weight=CLASS_WEIGHTS),
        partial(PER_SAMPLE, weight=CLASS_WEIGHTS),
    ),
    "own mean": (lambda o, y: of_each(o, y).mean(), F.cross_entropy, PER_SAMPLE),
    "own values": (lambda o, y: of_each(o, y).squeeze(1), F.cross_entropy, PER_SAMPLE),
    "own values, [B, 1]": (of_each, F.cross_entropy, PER_SAMPLE),
}


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("case", LOSSES)
def test_penalized_loss_of_every_kind_of_loss(case, size):
    loss, mean, of_samples = LOSSES[case]
    net, (x, y) = mlp(), classes().tensors
    module = gpkit.PenalizedModule(net, loss, INPUT())
    params = {name: p.detach() for name, p in net.named_parameters()}
    x, y = x[:size], y[:size]

    def of_one(x, y):
        return of_samples(functional_call(net, params, (x[None],)), y[None]).squeeze()

    norms = oracles.input_norms(of_one, 1, x, y)  # no batch size in it
    true = mean(net(x), y) + 0.5 * norms.square().mean()
    torch.testing.assert_close(module.penalized_loss((x, y)), true, rtol=1e-10, atol=0)


def test_penalized_loss_needs_no_trainer_and_counts_its_calls():
    net, batch = mlp(), classes().tensors
    module = gpkit.PenalizedModule(net, F.cross_entropy, WEIGHT(every=2))
    bare = gpkit.PenalizedModule(net, F.cross_entropy).penalized_loss(batch)
    on, off, again = (module.penalized_loss(batch) for _ in range(3))
    assert torch.equal(off, bare)
    assert torch.equal(on, again)
    assert on > off
    on.backward()
    assert all(p.grad is not None for p in net.parameters())


class Heads(nn.Module):
    """A net that gives a dict."""

    def __init__(self):
        super().__init__()
        self.body = mlp(outputs=4)

    def forward(self, x):
        return {"class": self.body(x)[:, :3], "value": self.body(x)[:, 3]}


def heads_loss(output, target):
    label, value = target
    return F.cross_entropy(output["class"], label) + F.mse_loss(output["value"], value)


def test_outputs_and_targets_may_be_collections():
    net, (x, label) = Heads(), classes().tensors
    y = (label, x[:, 0])
    module = gpkit.PenalizedModule(net, heads_loss, INPUT())
    params = {name: p.detach() for name, p in net.named_parameters()}

    def of_one(x, *y):
        output = functional_call(net, params, (x[None],))
        return heads_loss(output, [part[None] for part in y])

    true = heads_loss(net(x), y) + 0.5 * oracles.input_norms(of_one, 1, x, *y).square().mean()
    torch.testing.assert_close(module.penalized_loss((x, y)), true)

    logits = gpkit.jacobian(0.2, of=lambda output: output["class"], estimator="exact")
    module = gpkit.PenalizedModule(net, heads_loss, logits, optimizer=SGD)
    rows = oracles.input_norms(lambda x: functional_call(net, params, (x[None],))["class"], 1, x)
    true = heads_loss(net(x), y) + 0.1 * rows.square().mean()
    torch.testing.assert_close(module.penalized_loss((x, y)), true)

    loader = DataLoader([(x, y)], batch_size=None)
    trainer().fit(module, loader, loader)
    assert "val/loss" in module.trainer.callback_metrics


def test_whole_numbers_as_inputs():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    data = TensorDataset(torch.arange(16).reshape(8, 2) % 5, torch.arange(8) % 3)
    record = Record()
    fit(net, WEIGHT(), data, options={"logger": record})
    assert {name for row in record.rows for name in row} & NORMS == {"grad_norm/weight"}
    with pytest.raises(TypeError, match=r"needs floating-point samples; got torch\.int64"):
        fit(net, INPUT(), data)


@pytest.mark.parametrize("how", ["fit", "validate", "test"])
def test_the_batch_of_the_user_is_left_alone(how):
    x, y = classes(B).tensors
    before = x.clone()
    module = gpkit.PenalizedModule(mlp(), F.cross_entropy, {"a": INPUT(), "b": SLOPE()})
    getattr(trainer(), how)(module, DataLoader([(x, y)], batch_size=None))
    assert not x.requires_grad
    assert x.grad is None
    assert not x.is_inference()
    assert torch.equal(x, before)


# Around training.


def test_prediction_is_what_the_net_gives():
    data = classes()
    module = gpkit.PenalizedModule(mlp(), F.cross_entropy)
    for loader in (DataLoader(data, B), DataLoader(data.tensors[0], B)):
        found = torch.cat(trainer().predict(module, loader))
        assert torch.equal(found, module.net(data.tensors[0]))


def test_scheduler_steps_every_epoch():
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = gpkit.PenalizedModule(mlp(), F.cross_entropy, optimizer=SGD, scheduler=halve)
    runner = trainer(max_epochs=3)
    runner.fit(module, DataLoader(classes(), B))
    assert runner.optimizers[0].param_groups[0]["lr"] == LR / 8


def randomly_penalised(**more):
    penalty = {"j": gpkit.jacobian(0.2), "line": gpkit.wgan_gp(1.0), "w": WEIGHT(every=3)}
    return gpkit.PenalizedModule(mlp(), F.cross_entropy, {**penalty, **more})


def test_a_resumed_run_is_the_run(tmp_path):
    loader = DataLoader(classes(), B)
    whole = randomly_penalised()
    trainer(max_epochs=3).fit(whole, loader)

    torch.manual_seed(0)
    half, runner = randomly_penalised(), trainer(max_epochs=2)
    runner.fit(half, loader)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    states = torch.load(tmp_path / "half.ckpt", weights_only=True)["gpkit_penalties"]
    assert states == {
        "j": {"step": 8, "draws": 8, "seed": 0},
        "line": {"step": 8, "draws": 8, "seed": 0},
        "w": {"step": 8, "draws": 3, "seed": 0},
    }

    torch.manual_seed(99)
    resumed = randomly_penalised()
    trainer(max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert resumed.penalties["line"].state_dict() == whole.penalties["line"].state_dict()


def test_a_penalty_that_a_checkpoint_lacks_begins_at_its_beginning(tmp_path):
    loader, runner = DataLoader(classes(), B), trainer(max_epochs=1)
    runner.fit(randomly_penalised(), loader)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    module = randomly_penalised(new=gpkit.wgan_lp(1.0, seed=5))
    trainer(max_epochs=1).fit(module, loader, ckpt_path=tmp_path / "half.ckpt")
    assert module.penalties["new"].state_dict() == {"step": 0, "draws": 0, "seed": 5}
    assert module.penalties["line"].draws == 4


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"net": lambda x: x}, TypeError, r"`net=...` must be a torch.nn.Module; got a function"),
        ({"loss": 3}, TypeError, r"`loss=...` must be a function \(output, y\) -> loss; got 3"),
        ({"penalty": "r1"}, TypeError, r"must be a penalty, or a list or dict of them; got 'r1'"),
        (
            {"penalty": gpkit.r1},
            TypeError,
            r"a list or dict of them; got <function",
        ),
        (
            {"penalty": [gpkit.r1]},
            TypeError,
            r"a list or dict of them; got \[",
        ),
        ({"penalty": {"a": 1.0}}, TypeError, r"`penalty=\{'a': ...\}` must be a penalty; got 1.0"),
        ({"metrics": {"f1": "f1"}}, TypeError, r"`metrics=...` must be torchmetrics by name"),
        ({"metrics": 3}, TypeError, r"`metrics=...` must be torchmetrics by name.*got 3"),
        ({"histogram_every_n_epochs": -1}, ValueError, r"must be an integer >= 0; got -1"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        gpkit.PenalizedModule(**{"net": mlp(), "loss": F.mse_loss, **arguments})


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.ones(4, 5), "Tensor"),
        ({"x": torch.ones(4, 5)}, "dict"),
        ([torch.ones(4, 5)], "list"),
        ((torch.ones(4, 5),) * 4, "tuple"),
        (([1.0], [0]), "tuple"),
    ],
)
def test_wrong_batches(batch, found):
    module = gpkit.PenalizedModule(mlp(), F.cross_entropy, WEIGHT())
    with pytest.raises(TypeError, match=rf"takes batches \(x, y\).*with a tensor x.*got {found}"):
        module.penalized_loss(batch)


def test_a_penalty_that_trains_nothing_ends_training():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(RuntimeError, match="order 2 of a piecewise-linear net"):
        fit(net, gpkit.curvature(), classes())
