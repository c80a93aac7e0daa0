"""per_sample: each sample's loss, from a loss of any kind."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpkit.losses import per_sample

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 5.0], [0.5, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 0, 2])
NEGATIVE_LOG = LOGITS.logsumexp(1) - LOGITS[torch.arange(4), LABELS]  # [B], from the definition
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


def squares(output, target):
    return (output - target) ** 2


def own(output, target, reduction="mean"):
    return squares(output, target) if reduction == "none" else squares(output, target).mean()


CASES = [  # loss, output, target, the losses of the samples
    (nn.CrossEntropyLoss(), LOGITS, LABELS, NEGATIVE_LOG),
    (nn.CrossEntropyLoss(reduction="sum"), LOGITS, LABELS, NEGATIVE_LOG),
    (nn.CrossEntropyLoss(reduction="none"), LOGITS, LABELS, NEGATIVE_LOG),
    (nn.CrossEntropyLoss(CLASS_WEIGHTS), LOGITS, LABELS, NEGATIVE_LOG * CLASS_WEIGHTS[LABELS]),
    (F.cross_entropy, LOGITS, LABELS, NEGATIVE_LOG),
    (partial(F.cross_entropy, reduction="sum"), LOGITS, LABELS, NEGATIVE_LOG),
    (
        partial(F.cross_entropy, weight=CLASS_WEIGHTS),
        LOGITS,
        LABELS,
        NEGATIVE_LOG * CLASS_WEIGHTS[LABELS],
    ),
    # [B, C, P] logits: the mean over the P pixels of a sample
    (
        F.cross_entropy,
        torch.stack([LOGITS, 0 * LOGITS], 2),
        torch.stack([LABELS, LABELS], 1),
        (NEGATIVE_LOG + torch.tensor(3.0).log()) / 2,
    ),
    (nn.MSELoss(), LOGITS, 0 * LOGITS, (LOGITS**2).mean(1)),
    (nn.MSELoss(), LOGITS[:, :1], 0 * LOGITS[:, :1], LOGITS[:, 0] ** 2),  # [B, 1]
    (F.l1_loss, LOGITS, 0 * LOGITS, LOGITS.mean(1)),
    (own, LOGITS, 0 * LOGITS, (LOGITS**2).mean(1)),
    (squares, LOGITS[:, 0], 0 * LOGITS[:, 0], LOGITS[:, 0] ** 2),
    (squares, LOGITS[:, :1], 0 * LOGITS[:, :1], LOGITS[:, 0] ** 2),
    (squares, LOGITS, 0 * LOGITS, (LOGITS**2).mean(1)),
    (lambda o, y: F.cross_entropy(o, y), LOGITS, LABELS, NEGATIVE_LOG.mean().expand(4)),
]


@pytest.mark.parametrize(("loss", "output", "target", "expected"), CASES)
def test_losses_of_the_samples(loss, output, target, expected):
    torch.testing.assert_close(per_sample(loss)(output, target), expected)


def test_a_loss_module_keeps_its_reduction():
    loss = nn.CrossEntropyLoss()
    per_sample(loss)
    assert loss.reduction == "mean"


@pytest.mark.parametrize(
    ("target", "label"),
    [
        (LABELS, lambda y: y),
        ((LABELS, LABELS), lambda y: y[0]),
        ({"label": LABELS}, lambda y: y["label"]),
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_a_mean_has_the_input_gradients_of_the_samples(target, label):
    x = LOGITS.clone().requires_grad_()
    losses = per_sample(lambda output, y: F.cross_entropy(output, label(y)))(x, target)
    (found,) = torch.autograd.grad(losses.sum(), x)
    (true,) = torch.autograd.grad(F.cross_entropy(x, LABELS, reduction="sum"), x)
    torch.testing.assert_close(found, true)  # the 1/B that the mean hides is undone
