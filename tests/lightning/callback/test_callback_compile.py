"""GradientPenaltyCallback(compile=True): training steps as graphs train and log as eager ones."""

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import gpkit
from gpkit.lightning.callback.step import PenalizedStep


class Net(pl.LightningModule):
    def __init__(self, metric=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        self.metric = metric

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = nn.functional.cross_entropy(out, y)
        if self.metric is not None:
            self.metric(loss.item())
        self.log("train/loss", loss)
        self.log_dict({"train/acc": (out.argmax(1) == y).float().mean()}, prog_bar=True)
        return {"loss": loss, "out": out.detach()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(monkeypatch, penalties, *, compile, metric=None):
    """Return the module, the penalties, what was logged, and the compiled step."""
    made = []
    init = PenalizedStep.__init__
    monkeypatch.setattr(
        PenalizedStep, "__init__", lambda self, *a, **k: init(self, *a, **k) or made.append(self)
    )
    torch.manual_seed(0)
    module = Net(metric)
    callback = gpkit.GradientPenaltyCallback(penalties, module="net", compile=compile)
    options = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, **QUIET}
    trainer = pl.Trainer(callbacks=[callback], logger=False, **options)
    data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    trainer.fit(module, DataLoader(data, batch_size=8))
    return module, callback.penalties, trainer.callback_metrics, made[-1]._compiled


def several():
    return [
        gpkit.weight_grad_norm(weight=0.3, seed=1),
        gpkit.input_grad_norm(weight=gpkit.warmup(0.2, steps=3), seed=2),  # of the loss
        gpkit.r1(weight=0.1, of=lambda out: out[:, 0], at="perturb", seed=3),
    ]


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.filterwarnings("ignore:the outputs of a batch depend")
def test_trains_and_logs_as_the_eager_one(monkeypatch):
    eager, found = (fitted(monkeypatch, several(), compile=c) for c in (False, True))
    assert found[3].loss.obstacle is None
    assert len(found[3].loss._plans) == 1
    torch.testing.assert_close(dict(found[0].state_dict()), dict(eager[0].state_dict()))
    torch.testing.assert_close(dict(found[2]), dict(eager[2]))
    assert {n: p.state_dict() for n, p in found[1].items()} == {
        n: p.state_dict() for n, p in eager[1].items()
    }


def test_a_step_that_cannot_be_traced_runs_as_it_is(monkeypatch):
    penalties = gpkit.weight_grad_norm(weight=0.3)
    with pytest.warns(
        UserWarning, match=r"CompiledStep.computed is not compiled: .*callback_compile.py"
    ):
        found = fitted(monkeypatch, penalties, compile=True, metric=MeanMetric())
    eager = fitted(
        monkeypatch, gpkit.weight_grad_norm(weight=0.3), compile=False, metric=MeanMetric()
    )
    torch.testing.assert_close(dict(found[0].state_dict()), dict(eager[0].state_dict()))
    assert found[0].metric.compute() == eager[0].metric.compute()


def test_a_penalty_that_runs_the_step_again_is_not_compiled(monkeypatch):
    penalty = gpkit.input_grad_norm(weight=0.3, at="perturb")
    with pytest.warns(UserWarning, match=r"no effect: 'input_grad_norm' runs the training step ag"):
        assert fitted(monkeypatch, penalty, compile=True)[3] is None
