"""GradientPenaltyCallback(compile=True) with losses, named inputs, and weights that adapt."""

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

import gpkit
from gpkit.lightning.callback.compiled import CompiledStep

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.usefixtures("graphs_alone"),
    pytest.mark.filterwarnings("ignore:the outputs of a batch depend"),
]


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.columns, self.kind = nn.Linear(3, 4), nn.Embedding(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, columns, kind):
        return self.head(torch.tanh(self.columns(columns) + self.kind(kind))).squeeze(1)


class Step(pl.LightningModule):
    """Knows nothing of gpkit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Table().double()

    def training_step(self, batch, batch_idx):
        losses = (self.net(columns=batch["columns"], kind=batch["kind"]) - batch["y"]).square()
        self.log("train/loss", losses.mean())
        return {"loss": losses.mean(), "losses": losses}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        rng = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
        kinds = torch.arange(6) % 3
        return DataLoader(
            [{"columns": draw(6, 3), "kind": kinds, "y": draw(6)} for _ in range(3)],
            batch_size=None,
        )


def of_outputs(out, batch):
    return (out - batch["y"]).square()


def each_sample():
    return gpkit.per_sample_grad_norm(weight=0.2, seed=1)


def named(**options):
    return gpkit.GradientPenalty(wrt=gpkit.inputs("columns"), seed=1, **options)


CASES = {
    "losses by key": ({"losses": "losses"}, each_sample),
    "losses by function": ({"losses": of_outputs}, each_sample),
    "named": ({}, lambda: named(weight=0.5)),
    "named, of the loss": ({"losses": "losses"}, lambda: named(weight=0.5, of="loss")),
    "named, elsewhere": ({}, lambda: named(weight=0.5, at="perturb")),
    "share": ({}, lambda: named(weight=gpkit.gradient_share(0.3))),
}


def fitted(monkeypatch, options, penalty, compile):
    """Return the parameters, what was logged, the penalty's state, and the compiled step."""
    steps, init = [], CompiledStep.__init__
    monkeypatch.setattr(
        CompiledStep, "__init__", lambda self, *a: init(self, *a) or steps.append(self)
    )
    module = Step()
    callback = gpkit.GradientPenaltyCallback(penalty, "net", compile=compile, **options)
    trainer = pl.Trainer(
        callbacks=[callback],
        max_epochs=1,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=False,
        **QUIET,
    )
    trainer.fit(module)
    state = dict(module.state_dict())
    return state, dict(trainer.callback_metrics), penalty.state_dict(), steps


@pytest.mark.parametrize(
    "name",
    [name if name == "share" else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_trains_as_the_eager_one(monkeypatch, name):
    options, make = CASES[name]
    runs = [fitted(monkeypatch, options, make(), c) for c in (False, True)]
    (state, logged, kept, _), (found, its_logged, its_kept, steps) = runs
    assert steps[0].loss.obstacle is None
    torch.testing.assert_close(found, state)
    torch.testing.assert_close(its_logged, logged)
    (numbers, how), (its_numbers, as_before) = map(tree_flatten, (kept, its_kept))
    assert how == as_before
    assert its_numbers == pytest.approx(numbers)
    unpenalised = fitted(monkeypatch, options, gpkit.weight_grad_norm(weight=0.0), False)[0]
    assert not torch.equal(unpenalised["net.head.weight"], state["net.head.weight"])
