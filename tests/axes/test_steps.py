"""Losses of steps [B, T], and weights of the steps, against loops over sequences cut to length."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import gpkit

B, T, D = 4, 5, 3
LENGTHS = (5, 2, 0, 3)
RNG = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


class Recurrent(nn.Module):
    """A step depends on the earlier ones alone, as in a causal net."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.RNN(D, 4, batch_first=True), nn.Linear(4, 1)
        self.double()

    def forward(self, x):  # [B, T, D] -> [B, T]
        return self.head(self.inner(x)[0]).squeeze(2)


NET = Recurrent()
X = draw(B, T, D) * torch.tensor([0.1, 2.0, 1.0, 3.0]).reshape(B, 1, 1)
Y = draw(B, T)
MASK = (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)).long()
PARAMS = {name: p.detach() for name, p in NET.named_parameters()}
WEIGHTS = {"inputs": None, "integers": MASK, "samples": torch.tensor([1.0, 0.0, 2.0, 0.5])}
WEIGHTS["steps"] = MASK * torch.linspace(0.5, 2.0, B * T, dtype=torch.float64).reshape(B, T)


def losses(x=X, y=Y):
    return (NET(x) - y).square()


def losses_at(params, i, length):
    """Return the losses [T_i] of the steps of one sequence that there are."""
    x, y = X[i : i + 1, :length], Y[i, :length]
    return lambda x: (functional_call(NET, params, (x,))[0] - y).square(), x


def by_hand(w, wrt):
    """Return the mean over the sequences with a step, Σ_i v_i ‖∇ Σ_t w_it l_it‖² / Σ_i v_i."""
    of_steps = w is not None and w.ndim == 2

    def value(params):
        values, shares = [], []
        for i in range(B):
            length = LENGTHS[i] if of_steps else T
            if length == 0:
                continue
            each = w[i, :length] if of_steps else torch.ones(T)
            shares.append(w[i] if w is not None and not of_steps else torch.ones(()))
            if wrt == "input":
                of, x = losses_at(params, i, length)
                g = [grad(lambda x, of=of, each=each: (each * of(x)).sum())(x)]
            else:

                def total(params, i=i, length=length, each=each):
                    of, x = losses_at(params, i, length)
                    return (each * of(x)).sum()

                g = grad(total)(params).values()
            values.append(sum(part.square().sum() for part in g))
        shares = torch.stack(shares).double()
        return (shares * torch.stack(values)).sum() / shares.sum()

    return value(PARAMS), grad(value)(PARAMS)


def assert_is(value, wanted, rtol=1e-9):
    torch.testing.assert_close(value.detach(), wanted[0], rtol=rtol, atol=0)
    found = torch.autograd.grad(value, list(NET.parameters()), allow_unused=True)
    for a, b in zip(found, wanted[1].values(), strict=True):
        a = torch.zeros_like(b) if a is None else a
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
def test_the_loss_of_a_sample_is_the_sum_over_its_steps(w):
    wanted = by_hand(w, "input")
    penalty = gpkit.input_grad_norm(1.0)
    assert_is(penalty(losses, X, sample_weight=w), wanted)
    x = X.clone().requires_grad_()
    assert_is(penalty(losses(x), x, sample_weight=w), wanted)
    difference = gpkit.input_grad_norm(1.0, estimator=gpkit.finite_difference(side="central"))
    assert_is(difference(losses, X, sample_weight=w), wanted, 1e-6)
    stencil = gpkit.input_grad_norm(1.0, estimator=gpkit.stencil(1e-3, 4))
    assert_is(stencil(losses, X, sample_weight=w), wanted, 1e-6)


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
def test_each_sample_in_the_weights(w):
    wanted = by_hand(w, "weight")
    penalty = gpkit.per_sample_grad_norm(1.0)
    assert_is(penalty(losses, NET, sample_weight=w), wanted)
    assert_is(penalty(losses(), NET.parameters(), sample_weight=w), wanted)


@pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
def test_the_batch_in_the_weights_has_the_mean_over_all_steps(w):
    each = torch.ones(B, T) if w is None else w.double().reshape(B, -1).expand(B, T)

    def value(params):
        def mean(params):
            found = (functional_call(NET, params, (X,)) - Y).square()
            return (each * found).sum() / each.sum()

        return sum(g.square().sum() for g in grad(mean)(params).values())

    wanted = value(PARAMS), grad(value)(PARAMS)
    penalty = gpkit.weight_grad_norm(1.0)
    assert_is(penalty(losses, NET, sample_weight=w), wanted)
    if w is None:
        total = penalty.with_loss(losses, NET)
        torch.testing.assert_close(total.detach(), losses().mean().detach() + wanted[0])


def test_a_context_of_the_whole_sequence():
    """x [B, S], losses [B, T]: one norm a sample."""
    a, x, w = draw(3, 4).requires_grad_(), draw(B, 3), draw(B, 4).exp()
    value = gpkit.input_grad_norm(1.0)(lambda x: torch.sin(x @ a), x, sample_weight=w)
    slopes = (w * torch.cos(x @ a)) @ a.T  # Σ_t w_t cos(x·a_t) a_t
    torch.testing.assert_close(value, slopes.square().sum(1).mean())
    jacobian = gpkit.GradientPenalty()(lambda x: torch.sin(x @ a), x)  # outputs are not added up
    each = torch.cos(x @ a).unsqueeze(2) * a.T
    torch.testing.assert_close(jacobian, each.square().sum((1, 2)).mean())


def test_padding_may_hold_anything():
    """A step whose weight is zero may be infinite, as the log of a padded probability."""
    x = draw(B, T, D).requires_grad_()
    found = torch.where(MASK == 0, torch.inf, x.square().sum(2))
    value = gpkit.input_grad_norm(1.0)(found, x, sample_weight=MASK)
    wanted = (2 * x * MASK.unsqueeze(2)).flatten(1).square().sum(1)[MASK.any(1)].mean()
    torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("layer", [nn.Linear(D, 4), nn.Linear(D, 4, bias=False)])
def test_outputs_of_a_linear_layer_are_no_losses(layer):
    layer = layer.double()
    for x in (X, X[:, 0]):
        for act in (
            lambda x=x: gpkit.input_grad_norm()(layer, x),
            lambda x=x: gpkit.per_sample_grad_norm()(lambda: layer(x), layer),
        ):
            with pytest.raises(ValueError, match="the output of a linear layer: compute the loss"):
                act()


def test_weights_that_fit_neither_samples_nor_steps():
    with pytest.raises(ValueError, match=r"each step of losses \[4, T\]; got \[4, 6\]"):
        gpkit.input_grad_norm()(losses, X, sample_weight=torch.ones(B, 6))
    with pytest.raises(ValueError, match=r"one number for each sample, \[4\]"):  # no losses
        gpkit.GradientPenalty()(NET, X, sample_weight=MASK)
    with pytest.raises(ValueError, match="must be >= 0; got -1"):
        gpkit.input_grad_norm()(losses, X, sample_weight=-MASK)
