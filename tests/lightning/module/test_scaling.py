"""PenalizedModule under a gradient scaler: the gradient inside of a penalty is scaled too."""

import by_hand
import matrix
import nets
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from modules import QUIET, SGD
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

import gpkit


class Watching(gpkit.Weight):
    """A weight of one, which keeps the norms that it is shown."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, step):
        return 1.0

    def observe(self, norms, step):
        self.seen.append(norms)


TINY = 1e-6  # of the loss: its gradients round to zero in float16, unless they are scaled


def fit(penalty, loss, **options):
    module = gpkit.PenalizedModule(nets.net(torch.float32), loss, penalty, optimizer=SGD, **options)
    module.log = lambda *args, **kwargs: None
    scaler = torch.amp.GradScaler("cpu")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        log_every_n_steps=10**6,
        **QUIET,
    )
    trainer.fit(module, matrix.Shares())
    return list(module.parameters())


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("build", [gpkit.weight_grad_norm, gpkit.input_grad_norm])
def test_a_compiled_loss_is_scaled_as_the_eager_one(build):
    """On every step: at this size of the loss an unscaled gradient is zero in float16."""

    def loss(output, y):
        return 0.1 * TINY * F.cross_entropy(output, y, reduction="none")

    seen = {False: [], True: []}
    for compile, norms in seen.items():
        fit(build(Watching(norms)), loss, compile=compile)
    assert len(seen[True]) == len(seen[False]) == matrix.BATCHES
    for compiled, eager in zip(seen[True], seen[False], strict=True):
        assert (eager > 0).all()
        torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_trains_as_the_recipe_of_mixed_precision(estimator):
    x, y = matrix.data()
    rows = [slice(i * matrix.B, (i + 1) * matrix.B) for i in range(matrix.BATCHES)]
    total = by_hand.TOTALS["weight", estimator]
    windows = [1] * matrix.BATCHES
    args = [[(x[r], y[r])] for r in rows], total, 0.3, SGD
    true = by_hand.train(nets.net(torch.float32), *args, precision="16", windows=windows)
    step = gpkit.finite_difference(by_hand.STEP) if estimator == "difference" else "exact"
    mine = fit(gpkit.weight_grad_norm(0.3, estimator=step), F.cross_entropy)
    assert matrix.difference(mine, list(true.parameters())) < 1e-6


@pytest.mark.parametrize(
    "penalty",
    [
        gpkit.weight_grad_norm(1.0),
        gpkit.weight_grad_norm(1.0, estimator="finite_difference"),
        gpkit.input_grad_norm(1.0),
    ],
    ids=["weight", "difference", "input"],
)
def test_a_small_gradient_does_not_round_to_zero(penalty):
    seen = []
    penalty.weight = Watching(seen)
    fit(penalty, lambda output, y: TINY * F.cross_entropy(output, y, reduction="none"))
    x, y = matrix.data()
    net = nets.net(torch.float32)
    x = x[: matrix.B].requires_grad_()
    losses = TINY * F.cross_entropy(net(x), y[: matrix.B], reduction="none")
    if "weights" in repr(penalty.wrt):
        grads = torch.autograd.grad(losses.mean(), list(net.parameters()))
        true = by_hand.squares(grads).sqrt()[None]
    else:
        (grad,) = torch.autograd.grad(losses.sum(), x)
        true = grad.norm(dim=1)
    torch.testing.assert_close(seen[0], true, rtol=0.02, atol=0)


def test_finite_differences_in_the_inputs_need_the_losses_of_the_samples():
    penalty = gpkit.input_grad_norm(estimator="finite_difference")
    module = gpkit.PenalizedModule(nn.Linear(5, 1), lambda o, y: ((o - y) ** 2).mean(), penalty)
    with pytest.raises(
        ValueError, match=r"the loss of each sample; got a `loss=...` that returns one"
    ):
        module.penalized_loss((torch.randn(4, 5), torch.randn(4, 1)))
