"""Batches that are dicts, dataclasses or named tuples, or have several inputs; sums by hand."""

import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import by_hand
import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gpkit

CE = nn.CrossEntropyLoss()
CLOSE = {"rtol": 0, "atol": 1e-12}


class Text(nn.Module):
    """Masked mean of embeddings; its output is an object with logits, as Hugging Face's."""

    def __init__(self, wrapped=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()
        self.wrapped = wrapped

    def forward(self, input_ids, attention_mask=None):
        return self.scores(self.embed(input_ids), attention_mask)

    def scores(self, h, mask):
        pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = self.head(torch.tanh(pooled))
        return SimpleNamespace(logits=logits, loss=None) if self.wrapped else logits


def text():
    rng = torch.Generator().manual_seed(1)
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    return {
        "input_ids": torch.randint(9, (6, 5), generator=rng),
        "attention_mask": mask,
        "labels": torch.randint(3, (6,), generator=rng),
    }


@dataclass
class Data:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


KINDS = {
    "dict": dict,
    "UserDict": UserDict,
    "dataclass": lambda d: Data(**d),
    "named tuple": lambda d: namedtuple("Batch", d)(**d),
    "x a dict": lambda d: ({k: d[k] for k in list(d)[:2]}, d["labels"]),
    "x a tuple": lambda d: ((d["input_ids"], d["attention_mask"]), d["labels"]),
}


def assert_equal(total, net, true):
    torch.testing.assert_close(total, true, **CLOSE)
    params = list(net.parameters())
    got, want = (torch.autograd.grad(v, params, retain_graph=True) for v in (total, true))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_in_the_weights(kind):
    net, d = Text(), text()
    module = gpkit.PenalizedModule(net, CE, gpkit.weight_grad_norm(weight=0.3))
    loss = F.cross_entropy(net(d["input_ids"], d["attention_mask"]).logits, d["labels"])
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    true = loss + 0.3 * by_hand.squares(grads)
    assert_equal(module.penalized_loss(KINDS[kind](d)), net, true)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_in_the_embeddings(kind):
    net, d = Text(), text()
    made = gpkit.input_grad_norm(weight=0.3, wrt=gpkit.activation("embed"))
    module = gpkit.PenalizedModule(net, CE, made)
    h = net.embed(d["input_ids"])
    logits = net.scores(h, d["attention_mask"]).logits
    losses = F.cross_entropy(logits, d["labels"], reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), h, create_graph=True)
    true = losses.mean() + 0.3 * slopes.square().flatten(1).sum(1).mean()
    assert_equal(module.penalized_loss(KINDS[kind](d)), net, true)


def test_integers_have_no_gradient():
    module = gpkit.PenalizedModule(Text(), CE, gpkit.input_grad_norm())
    with pytest.raises(TypeError, match=r"torch.int64: .* wrt=gpkit.activation\('embedding'\)"):
        module.penalized_loss(text())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(2, 3).double()

    def forward(self, left, right):
        return torch.tanh(self.a(left)) * torch.tanh(self.b(right))


@pytest.mark.parametrize("keys", [("left", "right"), ("right", "left")])
@pytest.mark.parametrize("named", [True, False], ids=["names", "positions"])
@pytest.mark.parametrize("moves", [False, True], ids=["at the data", "at two points a sample"])
def test_one_of_two_inputs(keys, named, moves):
    """The first named is differentiated in; more points than samples repeat the other."""
    if not named and keys[0] == "right":
        pytest.skip("positions are the order of the arguments")
    rng = torch.Generator().manual_seed(2)
    left, right = (torch.randn(6, n, generator=rng, dtype=torch.float64) for n in (4, 2))
    y = torch.randint(3, (6,), generator=rng)
    batch = {"left": left, "right": right, "goal": y} if named else (left, right, y)
    at = gpkit.mixture("real", "real") if moves else "data"
    made = gpkit.GradientPenalty(of="loss", at=at, weight=0.3)
    net = Two()
    options = {"inputs": keys, "target": "goal"} if named else {"inputs": (0, 1), "target": 2}
    module = gpkit.PenalizedModule(net, CE, made, **options)
    z = {"left": left, "right": right}[keys[0]].clone().requires_grad_()
    losses = F.cross_entropy(net(**{"left": left, "right": right, keys[0]: z}), y, reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
    true = losses.mean() + 0.3 * slopes.square().sum(1).mean()
    assert_equal(module.penalized_loss(batch), net, true)


def test_environments_under_a_name():
    rng = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 4, generator=rng).double(), torch.randint(3, (6,), generator=rng)
    env = torch.tensor([0, 1, 1, 0, 1, 1])
    totals = []
    for batch in ({"x": x, "label": y, "env": env}, (x, y, env)):
        torch.manual_seed(0)
        net = nn.Linear(4, 3).double()
        module = gpkit.PenalizedModule(net, CE, gpkit.irm(weight=1.0))
        totals.append(module.penalized_loss(batch).item())
    assert totals[0] == totals[1]


def test_a_fit_on_dicts_with_validation_test_and_prediction():
    d = text()
    rows = [{k: v[i] for k, v in d.items()} for i in range(6)]
    loader = DataLoader(rows, batch_size=3)
    module = gpkit.PenalizedModule(Text(), CE, gpkit.weight_grad_norm(weight=0.1))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, log_every_n_steps=1, **QUIET
    )
    trainer.fit(module, loader, loader)
    assert {"val/acc", "val/loss", "train/loss_total"} <= set(trainer.callback_metrics)
    logits = torch.cat([out.logits for out in trainer.predict(module, loader)])
    right = (logits.argmax(1) == d["labels"]).double().mean().item()
    (tested,) = trainer.test(module, loader, verbose=False)
    assert tested["test/acc"] == pytest.approx(right)


def test_what_cannot_be_read_is_told_with_what_to_do():
    module = gpkit.PenalizedModule(Text(), CE)
    with pytest.raises(TypeError, match="takes no 'idx', which the batch has: choose the inputs"):
        module.penalized_loss({**text(), "idx": torch.arange(6)})
    chosen = gpkit.PenalizedModule(Text(), CE, inputs=["input_ids", "attention_mask"])
    assert chosen.penalized_loss({**text(), "idx": torch.arange(6)}).ndim == 0
    with pytest.raises(TypeError, match=r"with the keys \['a'\]: say which .* inputs=\.\.\."):
        module.penalized_loss({"a": torch.zeros(3)})


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (gpkit.wgan_gp(), "interpolate"),
        (gpkit.r2(), "fake"),
        (gpkit.r1_r2(), "fake"),
        (gpkit.r1(), None),
        (gpkit.input_grad_norm(), None),
    ],
)
def test_points_that_need_fakes_are_told_of(made, told):
    """In the words of the callback, once, when the module is made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpkit.PenalizedModule(nn.Linear(4, 3), CE, {"mine": made})
    said = [str(w.message) for w in caught if "fake" in str(w.message)]
    assert len(said) == (told is not None)
    if told:
        words = f"penalty 'mine': at={told}() needs fake samples, which a training step does not"
        assert said[0].startswith(words)
