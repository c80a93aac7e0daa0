"""What of a submodule's input the callback differentiates, against loops by hand."""

import by_hand
import pytest
import torch
import torch.nn.functional as F
from fits import LAMBDA, assert_trained_as, batches, callback, difference, fit, one_rank, penalty
from modules import SGD, Plain
from nets import net
from torch import nn

import gpkit

ESTIMATORS = ["exact", "difference"]
estimators = pytest.mark.parametrize("estimator", ESTIMATORS)


def trained_by_hand(total, net=None, weight=LAMBDA):
    net = net or globals()["net"]()
    return by_hand.train(net, one_rank(batches()), total, weight, SGD, windows=[1] * 6)


class Called(Plain):
    """Calls its net otherwise than with x."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch[1])

    def forward(self, batch):
        return self.net(batch[0])


class ByKeyword(Called):
    def forward(self, batch):
        return self.net(x=batch[0])


class Second(Called):
    def forward(self, batch):
        return self.net(None, x=batch[0])


class AfterNone(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.backbone, self.head = net.backbone, net.head

    def forward(self, nothing, x):
        return self.head(self.backbone(x))


@estimators
def test_the_first_tensor_may_come_by_keyword(estimator):
    made = fit(ByKeyword(net()), callback("input", estimator), batches())
    assert_trained_as(made, trained_by_hand(by_hand.TOTALS["input", estimator]))


@estimators
def test_what_is_no_tensor_is_passed_over(estimator):
    made = fit(Second(AfterNone(net())), callback("input", estimator), batches())
    assert_trained_as(made, trained_by_hand(by_hand.TOTALS["input", estimator]))


class OwnForward(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def forward(self, x):
        return self.net(x)


@estimators
def test_without_a_name_it_is_the_modules_own_forward(estimator):
    cb = gpkit.GradientPenaltyCallback(penalty("input", estimator))
    made = fit(OwnForward(net()), cb, batches())
    assert_trained_as(made, trained_by_hand(by_hand.TOTALS["input", estimator]))


class InPlace(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.backbone, self.head = net.backbone, net.head

    def forward(self, x):
        return self.head(self.backbone(x.mul_(1.5)))


@estimators
def test_an_operation_in_place_on_the_input(estimator):
    """The batch of the user is what it was: the net gets a copy."""
    micro = batches()

    class Scaled(InPlace):
        def forward(self, x):
            return self.head(self.backbone(1.5 * x))

    made = fit(Plain(InPlace(net())), callback("input", estimator), micro)
    true = trained_by_hand(by_hand.TOTALS["input", estimator], Scaled(net()))
    assert_trained_as(made, true)
    for (x, _), (kept, _) in zip(micro, batches(), strict=True):
        assert torch.equal(x, kept)
        assert not x.requires_grad


@estimators
def test_layers_before_the_submodule_are_trained_by_the_penalty_too(estimator):
    """The input of the head is the activation of the backbone, and has a graph."""
    cb = gpkit.GradientPenaltyCallback(penalty("input", estimator), "net.head")
    made = fit(Plain(net()), cb, batches())
    assert_trained_as(made, trained_by_hand(by_hand.TOTALS["activation", estimator]))


@estimators
def test_an_input_that_requires_grad_already(estimator):
    class Leaf(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x.clone().requires_grad_()), y)

    made = fit(Leaf(net()), callback("input", estimator), batches())
    assert_trained_as(made, trained_by_hand(by_hand.TOTALS["input", estimator]))


def test_the_size_of_the_batch_may_change():
    micro = [(x[:b], y[:b]) for (x, y), b in zip(batches(), [6, 4, 6, 1, 2, 4], strict=True)]
    made = fit(Plain(net()), callback("input"), micro)
    total = by_hand.TOTALS["input", "exact"]
    true = by_hand.train(net(), one_rank(micro), total, LAMBDA, SGD, windows=[1] * 6)
    assert_trained_as(made, true)


def logits(net, x):
    return net.head(net.backbone(x))


def jacobian(net, x, y, weight, scale):
    """(λ/2) mean ‖∂f/∂x‖²_F, one output at a time."""
    x = x.clone().requires_grad_()
    f = logits(net, x)
    rows = [torch.autograd.grad(f[:, c].sum(), x, create_graph=True)[0] for c in range(3)]
    return F.cross_entropy(f, y) + weight / 2 * sum(r.square().sum(1) for r in rows).mean()


def test_the_output_of_the_submodule_is_what_is_differentiated():
    cb = gpkit.GradientPenaltyCallback(gpkit.jacobian(LAMBDA, estimator="exact"), "net")
    assert_trained_as(fit(Plain(net()), cb, batches()), trained_by_hand(jacobian))


def test_an_activation_in_the_input():
    """mean ‖∂h/∂x‖²_F, h the output of the backbone."""

    def total(net, x, y, weight, scale):
        x = x.clone().requires_grad_()
        h = net.backbone(x)
        rows = [torch.autograd.grad(h[:, c].sum(), x, create_graph=True)[0] for c in range(8)]
        loss = F.cross_entropy(net.head(h), y)
        return loss + weight * sum(r.square().sum(1) for r in rows).mean()

    made = gpkit.contractive(LAMBDA, of=gpkit.activation("backbone"), estimator="exact")
    scale = made.form.scale
    cb = gpkit.GradientPenaltyCallback(made, "net")
    assert_trained_as(
        fit(Plain(net()), cb, batches()), trained_by_hand(total, weight=LAMBDA * scale)
    )


def shifted(real, fake):
    return real + 0.3


def test_the_output_at_other_points():
    def total(net, x, y, weight, scale):
        loss = F.cross_entropy(logits(net, x), y)
        return (
            loss
            + jacobian(net, x + 0.3, y, weight, scale)
            - F.cross_entropy(logits(net, x + 0.3), y)
        )

    made = gpkit.jacobian(LAMBDA, estimator="exact", at=shifted)
    cb = gpkit.GradientPenaltyCallback(made, "net")
    assert_trained_as(fit(Plain(net()), cb, batches()), trained_by_hand(total))


FORMS = {
    "squared": (gpkit.squared(), lambda n: n**2),
    "two_sided": (gpkit.two_sided(0.2), lambda n: (n - 0.2) ** 2),
}
forms = pytest.mark.parametrize(("form", "value"), FORMS.values(), ids=FORMS)


def slopes(net, x, y, step=None):
    """n of every sample, of B·L at x; by a difference of B·L for each sample alone if asked."""
    x = x.clone().requires_grad_()

    def losses(x):
        return F.cross_entropy(logits(net, x), y, reduction="none")

    (g,) = torch.autograd.grad(losses(x).sum(), x, create_graph=step is None)
    if step is None:
        return g.norm(dim=1)
    v = g / g.norm(dim=1, keepdim=True)
    return (losses(x.detach() + step * v) - losses(x.detach())) / step


@forms
@estimators
def test_the_loss_at_other_points(form, value, estimator):
    """By differences to their error: the exact penalty's gradient is what they tend to."""

    def total(net, x, y, weight, scale):
        loss = F.cross_entropy(logits(net, x), y)
        return loss + weight * value(slopes(net, x + 0.3, y)).mean()

    small = gpkit.finite_difference(1e-5, "central") if estimator == "difference" else "exact"
    made = gpkit.input_grad_norm(LAMBDA, estimator=small, at=shifted, form=form)
    made = fit(Plain(net()), gpkit.GradientPenaltyCallback(made, "net"), batches())
    assert difference(made, trained_by_hand(total)) < (1e-12 if estimator == "exact" else 1e-7)


@forms
@estimators
def test_forms_at_the_data(form, value, estimator):
    def total(net, x, y, weight, scale):
        loss = F.cross_entropy(logits(net, x), y)
        return loss + weight * value(slopes(net, x, y)).mean()

    small = gpkit.finite_difference(1e-5, "central") if estimator == "difference" else "exact"
    made = gpkit.input_grad_norm(LAMBDA, estimator=small, form=form)
    made = fit(Plain(net()), gpkit.GradientPenaltyCallback(made, "net"), batches())
    assert difference(made, trained_by_hand(total)) < (1e-12 if estimator == "exact" else 1e-7)


def head_slopes(net, x, y):
    """n of every sample in the activation of the backbone, of B·L at x."""
    h = net.backbone(x)
    loss = F.cross_entropy(net.head(h), y, reduction="sum")
    return torch.autograd.grad(loss, h, create_graph=True)[0].norm(dim=1)


def test_the_loss_at_other_points_in_an_activation():
    """The inputs are moved, and what is differentiated in is the activation there."""

    def total(net, x, y, weight, scale):
        loss = F.cross_entropy(logits(net, x), y)
        return loss + weight * head_slopes(net, x + 0.3, y).square().mean()

    made = gpkit.input_grad_norm(LAMBDA, wrt=gpkit.activation("backbone"), at=shifted)
    made = fit(Plain(net()), gpkit.GradientPenaltyCallback(made, "net"), batches())
    assert_trained_as(made, trained_by_hand(total))


def test_the_output_at_other_points_in_an_activation():
    def total(net, x, y, weight, scale):
        h = net.backbone(x + 0.3)
        f = net.head(h)
        rows = [torch.autograd.grad(f[:, c].sum(), h, create_graph=True)[0] for c in range(3)]
        penalty = sum(r.square().sum(1) for r in rows).mean() / 2
        return F.cross_entropy(logits(net, x), y) + weight * penalty

    wrt = gpkit.activation("backbone")
    made = gpkit.jacobian(LAMBDA, wrt=wrt, estimator="exact", at=shifted)
    made = fit(Plain(net()), gpkit.GradientPenaltyCallback(made, "net"), batches())
    assert_trained_as(made, trained_by_hand(total))
