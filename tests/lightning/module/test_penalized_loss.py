"""penalized_loss: of every kind of loss, output, target and batch, without a trainer."""

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from loggers import Record
from penalised import INPUT, NORMS, SGD, SLOPE, WEIGHT, B, classes, fit, mlp, trainer
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import gpkit


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
    assert record.names() & NORMS == {"grad_norm/weight"}
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
