"""Fits on two processes with FSDP2 and penalties in the inputs: one process, trained by hand."""

import copy

import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from modules import QUIET
from pytorch_lightning.strategies import ModelParallelStrategy
from sharding import SGD, STEPS, B, H, data, pair, sharded, slope, smooth, whole
from torch.utils.data import DataLoader, Subset, TensorDataset

import gpkit
from gpkit.autodiff.sharding.gathering import is_sharded

pytestmark = pytest.mark.ddp


class Plain(pl.LightningModule):
    """A module that knows nothing of penalties, and shards itself."""

    def __init__(self):
        super().__init__()
        self.net = smooth()

    def configure_model(self):
        if not is_sharded(self):
            sharded(self.net)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return SGD(self.parameters())


class Penalized(gpkit.PenalizedModule):
    def configure_model(self):
        if not is_sharded(self):
            sharded(self.net)


def squares(f, x):
    """‖∂f_i/∂x_i‖² of each sample, by hand."""
    x = x.detach().requires_grad_() if x.is_leaf else x
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return g.square().sum(1)


def of_losses(net, x, y):
    return 0.2 * squares(lambda z: (net(z) - y).square(), x).mean()


def of_output(net, x, y):
    return 0.2 * squares(net, x).mean()


def of_activation(net, x, y):
    return 0.2 * squares(lambda h: (net[2:](h) - y).square(), net[:2](x)).mean()


def of_shifted(net, x, y):
    return 0.2 * squares(net, x + 1).mean()


def mean_over_processes(weights, values):
    """Each process has the weighted mean over its own samples, as under DDP."""
    parts = [(weights[r :: ranks.RANKS], values[r :: ranks.RANKS]) for r in range(ranks.RANKS)]
    return sum((w * v).sum() / w.sum() for w, v in parts) / ranks.RANKS


def of_compared(net, x, y):
    z = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
    n2 = (x.abs() * (g - x.cos())).square().sum(1)
    return 0.2 * mean_over_processes(y[:, 0], n2)


def of_compared_weights(net, x, y):
    params = list(net.parameters())
    grads = torch.autograd.grad(F.mse_loss(net(x), y), params, create_graph=True)
    rows = zip(grads, params, constants(), strict=True)
    return 0.3 * sum((p.detach().abs() * (g - t)).square().sum() for g, p, t in rows)


def constants():
    return [
        torch.cos(torch.arange(p.numel()).double()).reshape(p.shape) for p in smooth().parameters()
    ]


LOSSES = gpkit.input_grad_norm(0.2)
CASES = {  # penalties, the same by hand, keywords of the callback and of the trainer
    "losses in the inputs": (LOSSES, of_losses, {}, {}),
    "output in the inputs": (gpkit.input_grad_norm(0.2, of="output"), of_output, {}, {}),
    "losses in an activation": (
        gpkit.input_grad_norm(0.2, wrt=gpkit.activation("1")),
        of_activation,
        {},
        {},
    ),
    "output at other points": (
        gpkit.input_grad_norm(0.2, of="output", at=lambda x, _: x + 1),
        of_shifted,
        {},
        {},
    ),
    "target, metric and weights of the samples": (
        gpkit.input_grad_norm(
            0.2,
            of="output",
            metric=torch.abs,
            given={"target": lambda batch: batch[0].cos(), "sample_weight": lambda b: b[1][:, 0]},
        ),
        of_compared,
        {},
        {},
    ),
    "target and metric in the weights": (
        gpkit.weight_grad_norm(
            0.3,
            scope="global",
            estimator=gpkit.finite_difference(1e-4, side="central"),
            metric=torch.abs,
            given={"target": lambda _: constants()},
        ),
        of_compared_weights,
        {},
        {},
    ),
    "accumulation": (LOSSES, of_losses, {}, {"accumulate_grad_batches": 2}),
    "losses in the inputs, and weights": ([LOSSES, pair()[0]], of_losses, {}, {}),
}


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        devices=ranks.RANKS,
        strategy=ModelParallelStrategy(data_parallel_size=ranks.RANKS, tensor_parallel_size=1),
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        log_every_n_steps=1,
        **QUIET,
        **options,
    )


def part(rank):
    share = Subset(TensorDataset(*data(torch.float64)), range(rank, STEPS * B, ranks.RANKS))
    return DataLoader(share, B // ranks.RANKS)


def fits(rank):
    found = {}
    for name, (penalty, _, options, more) in CASES.items():
        module = Plain()
        penalties = copy.deepcopy(penalty)
        callback = gpkit.GradientPenaltyCallback(penalties, module="net", **options)
        runner = trainer(callbacks=[callback], **more)
        runner.fit(module, part(rank))
        found[name] = whole(module.net), {k: v.item() for k, v in runner.callback_metrics.items()}
    module = Penalized(smooth(), F.mse_loss, LOSSES, optimizer=SGD)
    runner = trainer()
    runner.fit(module, part(rank), part(rank))
    logged = {k: v.item() for k, v in runner.callback_metrics.items()}
    found["PenalizedModule"] = whole(module.net), logged
    try:
        refused = Penalized(smooth(), F.mse_loss, gpkit.weight_grad_norm(), optimizer=SGD)
        trainer().fit(refused, part(rank))
    except RuntimeError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def found():
    return ranks.run(fits)


def by_hand(case):
    """Train on one process; return the net, and what the last step saw."""
    penalty, term, _, more = CASES.get(case, CASES["losses in the inputs"])
    net = smooth()
    params, optimizer = list(net.parameters()), SGD(net.parameters())
    batches = list(zip(*(t.split(B) for t in data(torch.float64)), strict=True))
    window = more.get("accumulate_grad_batches", 1)
    for i, (x, y) in enumerate(batches):
        if i % window == 0:
            optimizer.zero_grad()

        def again(x=x, y=y):
            return torch.autograd.grad(F.mse_loss(net(x), y), params)

        extra = [0.0] * len(params)
        if isinstance(penalty, list):
            slopes, n = slope(again(), params, [True] * 6, again, "l2", H, "forward", x.dtype)
            extra = [0.1 * 2 * n * s for s in slopes]
        before, value = copy.deepcopy(net), term(net, x, y)
        ((F.mse_loss(net(x), y) + value) / window).backward()
        for p, e in zip(params, extra, strict=True):
            p.grad += e
        if i % window == window - 1:
            optimizer.step()
    return net, before, (x, y)


@pytest.mark.parametrize("case", [*CASES, "PenalizedModule"])
def test_a_sharded_fit_trains_as_one_process(case, found, record_property):
    net, *_ = by_hand(case)
    true, worst = net.state_dict(), 0.0
    for known in found:
        tolerance = 1e-6 if case == "target and metric in the weights" else 1e-12  # h²
        torch.testing.assert_close(known[case][0], true, rtol=tolerance, atol=tolerance)
        worst = max(worst, *((known[case][0][k] - v).abs().max().item() for k, v in true.items()))
    kind = "" if case == "PenalizedModule" else "GradientPenaltyCallback, "
    record_property("sharded", (f"{kind}{case}", worst))
    assert max((v - smooth().state_dict()[k]).abs().max() for k, v in true.items()) > 0.05


def test_what_is_logged_is_of_this_process(found):
    _, before, (x, y) = by_hand("PenalizedModule")
    for rank, known in enumerate(found):
        x_, y_ = x[rank :: ranks.RANKS], y[rank :: ranks.RANKS]
        loss, penalty = F.mse_loss(before(x_), y_), of_losses(before, x_, y_)
        grads = torch.autograd.grad(loss, list(before.parameters()))
        norm = sum(g.square().sum() for g in grads).sqrt()
        for case in ("PenalizedModule", "losses in the inputs"):
            logged = known[case][1]
            assert logged["penalty/input_grad_norm"] == pytest.approx(penalty.item())
            assert logged["train/loss_total"] == pytest.approx((loss + penalty).item())
        logged = known["PenalizedModule"][1]
        assert logged["grad_norm/weight"] == pytest.approx(norm.item())
        assert {"val/loss", "val/grad_norm/weight", "val/grad_norm/input"} <= set(logged)


def test_exact_weight_penalties_are_refused(found):
    for known in found:
        assert "a penalty in the weights needs whole weights, and FSDP2" in known["refused"]
