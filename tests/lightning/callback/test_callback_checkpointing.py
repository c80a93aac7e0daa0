"""Steps that run a forward again, by checkpointing, and steps that write to their batch."""

import by_hand
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import LAMBDA, assert_trained_as, batches, callback, fit, loader, one_rank, penalty
from modules import QUIET, SGD, Plain
from nets import net
from refused import refusal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import gpkit


def again(part, x):
    return checkpoint(part, x, use_reentrant=False)


class Checkpoints(Plain):
    """A part of the net, or the whole, is run again in the backward pass; or with "" nothing is."""

    def __init__(self, part, net):
        super().__init__(net)
        self.part = part

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.part == "net":
            f = again(self.net, x)
        elif not self.part:
            f = self.net(x)
        elif self.part == "net.backbone":
            f = self.net.head(again(self.net.backbone, x))
        else:
            f = again(self.net.head, self.net.backbone(x))
        return F.cross_entropy(f, y)


def trained_by_hand(total, net=net, windows=(1,) * 6):
    return by_hand.train(net(), one_rank(batches()), total, LAMBDA, SGD, windows=windows)


def activation(module):
    return gpkit.input_grad_norm(LAMBDA, wrt=gpkit.activation(module))


# By the part that is checkpointed: a penalty, of which submodule, and what it is by hand.
WEIGHT = (penalty, None, by_hand.weight_exact)
DIFFERENCE = (lambda: penalty("weight", "difference"), None, by_hand.weight_difference)
CASES = [
    *[
        (part, *case)
        for part in ("net", "net.backbone", "net.head")
        for case in (WEIGHT, DIFFERENCE)
    ],
    ("net", lambda: penalty("input"), "net", by_hand.input_exact),
    ("net", lambda: penalty("input"), "net.backbone", by_hand.input_exact),
    ("net", lambda: penalty("input"), "net.head", by_hand.activation_exact),
    ("net", lambda: activation("backbone"), "net", by_hand.activation_exact),
    ("net.backbone", lambda: penalty("input"), "net.backbone", by_hand.input_exact),
    ("net.backbone", lambda: activation("net.backbone"), None, by_hand.activation_exact),
    ("net.head", lambda: penalty("input"), "net.head", by_hand.activation_exact),
    ("net.head", lambda: activation("net.backbone.0"), None, None),
]


def hidden(net, x, y, weight, scale):
    """In what the Tanh of the backbone is given."""
    h = net.backbone[0](x)
    loss = F.cross_entropy(net.head(net.backbone[1](h)), y)
    return loss + weight * by_hand.sample_norms(loss, h, scale)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("part", "made", "module", "total"), CASES)
def test_what_is_made_again_is_what_was_made(part, made, module, total, accumulate):
    cb = gpkit.GradientPenaltyCallback(made(), module)
    trained = fit(Checkpoints(part, net()), cb, batches(), accumulate_grad_batches=accumulate)
    windows = [accumulate] * (6 // accumulate)
    assert_trained_as(trained, trained_by_hand(total or hidden, windows=windows))


def test_a_penalty_that_runs_the_step_again_beside_one_that_watches_it():
    """The forward that comes last is not the one whose backward is to come."""

    def total(net, x, y, weight, scale):
        both = by_hand.weight_difference(net, x, y, weight, scale)
        exact = by_hand.input_exact(net, x, y, weight, scale)
        return both + exact - F.cross_entropy(net(x), y)

    parts = {"again": penalty("weight", "difference"), "watches": penalty("input")}
    for order in (parts, dict(reversed(parts.items()))):
        cb = gpkit.GradientPenaltyCallback(order, "net")
        assert_trained_as(fit(Checkpoints("net", net()), cb, batches()), trained_by_hand(total))


def shifted(real, fake):
    return real + 0.3


MOVES = "runs under checkpointing, which reruns its forward in the backward pass"
AGAIN = "checkpointing recomputed a different forward pass"


@pytest.mark.parametrize(
    ("part", "axes", "error", "message"),
    [
        ("net", {"estimator": "difference"}, ValueError, AGAIN),
        ("net.head", {"estimator": "difference"}, RuntimeError, MOVES),
        ("net", {"at": shifted}, ValueError, AGAIN),
        ("net.head", {"at": shifted}, RuntimeError, MOVES),  # in the backward pass of the step
    ],
)
def test_a_moved_input_is_refused(part, axes, error, message):
    """Made again, the forward would be that of the input as it was, in silence for the head."""
    cb = gpkit.GradientPenaltyCallback(penalty("input", **axes), part)
    line = refusal(Checkpoints(part, net()), cb, error=error)
    assert message in line
    assert "use estimator='exact' at the data" in line.replace("Use", "use")


class Validates(Checkpoints):
    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def val_dataloader(self):
        return loader(batches(1))


def norms(part, order):
    """Return the norms in the log, after a fit with the monitor, or with a penalty as well."""
    names = {"inputs": "net", "activations": "net.backbone", "validation": True}
    made = {"monitor": gpkit.GradientNormMonitor(**names), "penalty": callback("input")}
    module, options = Validates(part, net()), {"log_every_n_steps": 2, "logger": False, **QUIET}
    cbs = [made[name] for name in order]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=cbs, **options)
    trainer.fit(module, loader(batches()))
    total = by_hand.input_exact if "penalty" in order else plain
    assert_trained_as(module, trained_by_hand(total))
    assert not module.net._forward_pre_hooks
    assert not module.net.backbone._forward_hooks
    return {k: v.item() for k, v in trainer.callback_metrics.items() if "grad_norm/" in k[:14]}


def plain(net, x, y, *_):
    return F.cross_entropy(net(x), y)


ORDERS = (["monitor"], ["monitor", "penalty"], ["penalty", "monitor"])


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_norms_beside_a_penalty_and_at_validation(order):
    """They are those without checkpointing."""
    found = norms("net", order)
    assert len(found) == 6
    assert found == pytest.approx(norms("", order), rel=1e-12)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x[:, :4, None] * torch.ones(4).to(x)).mean(1))


def test_fused_attention_that_is_made_again():
    """The backward pass of the step is not under the kernels of the step, unless all of it is."""
    attention = Attention().double()
    line = refusal(Checkpoints("net", attention), callback())
    assert "run the whole training under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)" in line
    with sdpa_kernel(SDPBackend.MATH):
        made = fit(Checkpoints("net", attention), callback(), batches())
    assert_trained_as(made, fit(Checkpoints("", attention), callback(), batches()).net)


class Scales(nn.Module):
    """Scales its input, in place or not."""

    def __init__(self, net, in_place):
        super().__init__()
        self.backbone, self.head, self.in_place = net.backbone, net.head, in_place

    def forward(self, x):
        return self.head(self.backbone(x.mul_(1.5) if self.in_place else x * 1.5))


def test_a_step_that_writes_to_its_batch_and_is_made_once():
    made = fit(Plain(Scales(net(), True)), callback(), batches())
    assert_trained_as(made, trained_by_hand(by_hand.weight_exact, lambda: Scales(net(), False)))


@pytest.mark.parametrize(
    "made",
    [
        lambda: penalty("weight", "difference"),
        lambda: penalty(scope="accumulated"),
        gpkit.per_sample_grad_norm,
    ],
    ids=["difference", "accumulated", "sample"],
)
def test_a_step_that_writes_to_its_batch_and_is_made_again(made):
    """On the same batch, which would be another one by then."""
    line = refusal(Plain(Scales(net(), True)), gpkit.GradientPenaltyCallback(made()))
    assert "the training step writes to its batch in place, and a penalty reruns it" in line


def test_a_batch_may_hold_what_was_made_in_inference_mode():
    """Weights of the samples, say, that no gradient needs: torch counts no writes to them."""

    class Ignores(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    with torch.inference_mode():
        extra = torch.ones(6)
    micro = [(x, y, extra) for x, y in batches()]
    made = fit(Ignores(net()), callback("weight", "difference"), micro)
    assert_trained_as(made, trained_by_hand(by_hand.weight_difference))
