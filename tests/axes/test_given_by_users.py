"""What users give on an axis: a function as form, integers, a tensor twice, a sum, a look."""

import copy

import oracles
import pytest
import torch
from compare import gradients, relative_error
from scenes import images, squared_errors
from torch import nn
from torch.nn import functional as F

import gpkit


def true_norms(s, points):
    return oracles.input_norms(lambda x: s.apply(s.params, x[None])[0], 1, points)


def test_a_form_may_be_any_function_of_the_norm():
    """Value and parameter gradient of mean |n - 1|, with slopes on both sides of one."""
    s = images()

    def total(params):
        n = oracles.input_norms(lambda x: s.apply(params, x[None])[0], 1, s.real)
        return (n - 1).abs().mean()

    grads, true = torch.func.grad_and_value(total)(s.params)
    found = gpkit.GradientPenalty(form=lambda n: (n - 1).abs())(s.net, s.real)
    assert relative_error(found, true) < 1e-12
    flat = torch.cat([grads[name].flatten() for name in s.params])
    assert relative_error(gradients(found, s.net), flat) < 1e-10


def test_a_form_function_is_finite_at_a_zero_gradient():
    net = nn.Linear(3, 1).requires_grad_()
    nn.init.zeros_(net.weight)
    penalty = gpkit.GradientPenalty(form=lambda n: (n - 1).square())
    value = penalty(net, torch.randn(4, 3))
    value.backward()
    assert value.item() == 1.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("form", "error", "said"),
    [
        (lambda n: n.mean(), ValueError, r"norms n \[5\], must return a value for each; got \[\]"),
        (lambda n: 1.0, ValueError, "must return a value for each; got float"),
        (gpkit.two_sided, TypeError, r"got the class two_sided: add parentheses, two_sided\(...\)"),
        ("two_sidet", ValueError, r"got 'two_sidet' \(did you mean 'two_sided'\?\)"),
    ],
    ids=["mean", "number", "class", "name"],
)
def test_a_form_that_is_none_is_refused(form, error, said):
    s = images()
    with pytest.raises(error, match=said):
        gpkit.GradientPenalty(form=form)(s.net, s.real)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integer_samples_are_interpolated_as_numbers(dtype):
    """One-hot tokens: α cast to integers would be zero, and every interpolate the fake."""
    s = images()
    tokens = torch.randint(2, s.real.shape, dtype=dtype)
    seen = []

    def critic(x):
        seen.append(x.detach())
        return s.net(x)

    found = gpkit.wgan_gp(weight=2.0, seed=1)(critic, real=tokens, fake=s.fake)
    as_numbers = gpkit.wgan_gp(weight=2.0, seed=1)(critic, real=tokens.double(), fake=s.fake)
    assert torch.equal(*seen)
    assert not torch.isclose(seen[0], s.fake).all(dim=(1, 2, 3)).any()
    assert found == as_numbers
    true = 2 * (true_norms(s, seen[0]) - 1).square().mean()
    assert relative_error(found, true) < 1e-12
    with pytest.raises(TypeError, match=r"floating-point samples; got torch\.(int64|uint8)"):
        gpkit.wgan_gp()(critic, real=tokens, fake=tokens)


def test_a_parameter_that_stands_twice_in_a_list_counts_once():
    encoder, decoder = nn.Linear(3, 3), nn.Linear(3, 3)
    decoder.weight = encoder.weight
    x = torch.randn(5, 3)
    loss = decoder(encoder(x).tanh()).square().mean()
    listed = [*encoder.parameters(), *decoder.parameters()]
    once = list(dict.fromkeys(listed))
    assert len(once) < len(listed)
    true = sum(g.square().sum() for g in torch.autograd.grad(loss, once, retain_graph=True))
    assert relative_error(gpkit.weight_grad_norm(1.0)(loss, listed), true) < 1e-6


def test_a_sum_over_the_groups():
    s = images()
    true = true_norms(s, s.real).square().sum()
    summed = gpkit.GradientPenalty(reduce="sum")(s.net, s.real)
    assert relative_error(summed, true) < 1e-12
    losses = squared_errors(s.net(s.real), s.target)
    each = gpkit.per_sample_grad_norm(1.0, reduce="sum")(losses, s.net.parameters())
    mean = gpkit.per_sample_grad_norm(1.0)(losses, s.net.parameters())
    assert relative_error(each, len(losses) * mean) < 1e-12


@pytest.mark.parametrize(
    "build", [gpkit.wgan_gp, gpkit.dragan, gpkit.jacobian], ids=lambda f: f.__name__
)
def test_looking_at_the_terms_changes_no_training(build):
    s = images(outputs=3 if build is gpkit.jacobian else 1)
    arguments = {"real": s.real} if build is not gpkit.wgan_gp else {"real": s.real, "fake": s.fake}
    plain = build(seed=0)
    looked = copy.deepcopy(plain)
    for _ in range(3):
        shown = looked.terms(s.net, **arguments).penalty
        assert torch.equal(looked.terms(s.net, **arguments).penalty, shown)
        value = looked(s.net, **arguments)
        assert torch.equal(shown, value)  # what the next call draws
        assert torch.equal(value, plain(s.net, **arguments))
    assert F.mse_loss(shown, value) == 0
    assert looked.state_dict() == plain.state_dict()
