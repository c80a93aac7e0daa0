"""What a PenalizedModule logs, in training and in evaluation, against torch.func."""

from functools import partial

import oracles
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from loggers import Record
from penalised import INPUT, NORMS, SGD, WEIGHT, B, assert_same, classes, fit, mlp, trainer, values
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import gpkit


def test_logging_changes_no_training():
    net, data = mlp(), classes()
    bare = fit(net, INPUT(), data, gradient_norms=False, histogram_every_n_epochs=0)
    assert_same(fit(net, INPUT(), data), bare)


def test_bfloat16_penalises_as_float32_does():
    net, data, record = mlp().float(), classes(), Record()
    data = TensorDataset(data.tensors[0].float(), data.tensors[1])
    fit(net, WEIGHT(), data, options={"logger": record, "precision": "bf16-mixed"})
    params = {name: p.detach() for name, p in net.named_parameters()}
    _, of_weights, of_inputs = true_norms(net, params, *next(iter(DataLoader(data, B))))
    first = record.rows_with("train/loss")[0]
    assert first["penalty/weight_grad_norm"] == pytest.approx(
        0.1 * float(of_weights) ** 2, rel=0.05
    )
    assert first["grad_norm/input"] == pytest.approx(float(of_inputs.mean()), rel=0.05)


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
    assert len(record.rows_with("train/loss")) == 8
    latest = None
    for t, row in enumerate(record.rows_with("train/loss")):
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
    assert record.names() == names


def test_gradient_norms_are_taken_on_logged_steps_alone():
    record = Record()
    fit(mlp(), None, classes(), options={"logger": record, "log_every_n_steps": 3})
    assert [row.keys() & NORMS for row in record.rows_with("train/loss")] == [
        NORMS,
        NORMS,
    ]  # steps 3 and 6 of 8


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


class StopsIn(pl.Callback):
    """Ends a fit after a step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 6


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.parametrize(
    "options",
    [
        {"log_every_n_steps": 3},
        {"log_every_n_steps": 3, "accumulate_grad_batches": 2},
        {"log_every_n_steps": 100, "max_steps": 6},
        {"log_every_n_steps": 100, "callbacks": StopsIn()},
    ],
    ids=["plain", "accumulation", "max_steps", "stopped by a callback"],
)
def test_steps_that_nobody_sees_are_not_logged_and_nothing_is_missing(options, monkeypatch):
    # catches a lazy penalty's norm, a final metric or a row that is lost with the other steps
    calls = []
    log = pl.LightningModule.log

    def counted(self, *args, **kwargs):
        calls.append(args[0])
        log(self, *args, **kwargs)

    def fitted():
        calls.clear()
        record, data = Record(), DataLoader(classes(20), B)  # five batches an epoch
        penalties = {"now": WEIGHT(), "lazy": INPUT(every=2)}
        torch.manual_seed(3)
        module = gpkit.PenalizedModule(mlp(), F.cross_entropy, penalties, optimizer=SGD)
        run = trainer(**{"max_epochs": 3, "logger": record, **options})
        run.fit(module, data)
        return record.rows, dict(run.callback_metrics), calls.count("train/loss")

    monkeypatch.setattr(pl.LightningModule, "log", counted)
    rows, metrics, count = fitted()
    monkeypatch.setattr("gpkit.lightning.module.logged.shows", lambda trainer: True)
    all_rows, all_metrics, of_all = fitted()
    assert rows == all_rows
    assert rows or options["log_every_n_steps"] == 100
    assert metrics.keys() == all_metrics.keys()
    assert all(torch.equal(metrics[k], all_metrics[k]) for k in metrics)
    assert "penalty/lazy/norm" in metrics
    assert count < of_all
