"""Forms: the formula, its derivative, and what happens at zero, NaN and infinity."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpkit
from gpkit.autodiff.numerics import root
from gpkit.axes.form import FORMS

examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)
positive = st.floats(0.01, 100)

# name: the form, n -> value, n -> d value / dn
TABLE = {
    "squared": (gpkit.squared(), lambda n: n**2, lambda n: 2 * n),
    "norm": (gpkit.norm(), lambda n: n, lambda n: 1.0),
    "two_sided": (gpkit.two_sided(1.5), lambda n: (n - 1.5) ** 2, lambda n: 2 * (n - 1.5)),
    "one_sided": (
        gpkit.one_sided(1.5),
        lambda n: max(0.0, n - 1.5) ** 2,
        lambda n: 2 * max(0.0, n - 1.5),
    ),
    "absolute": (
        gpkit.absolute(1.5),
        lambda n: abs(n - 1.5),
        lambda n: math.copysign(1.0, n - 1.5) if n != 1.5 else 0.0,
    ),
    "absolute_0": (gpkit.absolute(0.0), lambda n: n, lambda n: 1.0),
    "tensor": (
        gpkit.two_sided(torch.tensor(1.5)),
        lambda n: (n - 1.5) ** 2,
        lambda n: 2 * (n - 1.5),
    ),
    "power": (gpkit.power(6), lambda n: n**6, lambda n: 6 * n**5),
    "power_3": (gpkit.power(3), lambda n: n**3, lambda n: 3 * n**2),
    "power_1": (gpkit.power(1.2), lambda n: n**1.2, lambda n: 1.2 * n**0.2),
    "half": (gpkit.squared(scale=0.5), lambda n: n**2 / 2, lambda n: n),
    "scaled": (gpkit.two_sided(2.0, scale=3.0), lambda n: 3 * (n - 2) ** 2, lambda n: 6 * (n - 2)),
    "center_0": (gpkit.two_sided(0.0), lambda n: n**2, lambda n: 2 * n),
    "one_sided_0": (gpkit.one_sided(0.0), lambda n: n**2, lambda n: 2 * n),
}
forms = pytest.mark.parametrize(("form", "value", "slope"), TABLE.values(), ids=TABLE)


def squares(*norms):
    return torch.tensor([n**2 for n in norms], dtype=torch.float64, requires_grad=True)


@forms
@examples
@given(n=positive)
def test_value_and_derivative(form, value, slope, n):
    n2 = squares(n, 0.5, 4.0)
    found = form(n2)
    assert found.tolist() == pytest.approx([value(n), value(0.5), value(4.0)])
    (grad,) = torch.autograd.grad(found.sum(), n2)
    true = [slope(m) / (2 * m) for m in (n, 0.5, 4.0)]  # dn / dn² = 1 / 2n
    assert grad.tolist() == pytest.approx(true)


@forms
def test_zero(form, value, slope):
    # catches the NaN of a root of zero
    w = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    values = form(w.square().sum(1))
    assert values.tolist() == [value(0.0)] * 2
    (grad,) = torch.autograd.grad(values.sum(), w)
    assert torch.equal(grad, torch.zeros_like(w))


@forms
def test_nan_and_infinity_are_not_masked(form, value, slope):
    nan, inf = form(torch.tensor([math.nan, math.inf])).tolist()
    assert math.isnan(nan)
    assert inf == math.inf


@forms
def test_is_a_value(form, value, slope):
    assert pickle.loads(pickle.dumps(form)) == form
    with pytest.raises(AttributeError, match="cannot assign"):
        form.scale = 2.0


def test_zero_centred_forms_take_no_root():
    # a root would lose half of the digits: 1e-30 is no square of a number near 1
    tiny = torch.tensor([1e-30], requires_grad=True)
    for form in (gpkit.squared(), gpkit.two_sided(0.0), gpkit.one_sided(0.0), gpkit.power(2)):
        assert "Sqrt" not in repr(form(tiny).grad_fn)
        assert torch.equal(form(tiny), tiny)


def test_root():
    n2 = squares(0.0, 2.0)
    assert root(n2).tolist() == [0.0, 2.0]
    assert torch.autograd.grad(root(n2).sum(), n2)[0].tolist() == [0.0, 0.25]


def rooted(n, eps):
    return math.sqrt(n**2 + eps)


# form(eps) and the function of √(n² + ε)
WITH_EPS = {
    "norm": (lambda e: gpkit.norm(eps=e), lambda m: m),
    "two_sided": (lambda e: gpkit.two_sided(1.0, eps=e), lambda m: (m - 1) ** 2),
    "centre_0": (lambda e: gpkit.two_sided(0.0, eps=e), lambda m: m**2),
    "one_sided": (lambda e: gpkit.one_sided(0.001, eps=e), lambda m: max(0.0, m - 0.001) ** 2),
    "one_sided_0": (lambda e: gpkit.one_sided(0.0, eps=e), lambda m: m**2),
    "absolute": (lambda e: gpkit.absolute(1.0, eps=e), lambda m: abs(m - 1)),
    "power": (lambda e: gpkit.power(1.5, eps=e), lambda m: m**1.5),
    "power_6": (lambda e: gpkit.power(6, eps=e), lambda m: m**6),
}


@pytest.mark.parametrize("eps", [1e-12, 1e-4, 0.3])
@pytest.mark.parametrize(("form", "value"), WITH_EPS.values(), ids=WITH_EPS)
def test_epsilon_inside_of_the_root(form, value, eps):
    # at n = 0 published code has (√ε - c)², and a gradient of zero in the weights
    w = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    found = form(eps)(w.square().sum(1))
    true = [value(rooted(n, eps)) for n in (0.0, 5.0, 0.1)]
    assert found.tolist() == pytest.approx(true, rel=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), w)
    assert grad[0].tolist() == [0, 0]
    h = 1e-6
    slope = (value(rooted(5 + h, eps)) - value(rooted(5 - h, eps))) / (2 * h)
    assert grad[1].tolist() == pytest.approx([slope * 0.6, slope * 0.8], rel=1e-6)


@pytest.mark.parametrize(
    ("make", "value", "slope"),
    [
        (gpkit.two_sided, lambda d: d**2, lambda d: 2 * d),
        (gpkit.one_sided, lambda d: max(d, 0.0) ** 2, lambda d: 2 * max(d, 0.0)),
        (gpkit.absolute, abs, lambda d: math.copysign(1, d)),
    ],
)
def test_a_centre_for_each_norm_with_a_graph(make, value, slope):
    # catches a centre that is detached, or one for all
    c = torch.tensor([1.0, 4.0, 2.5], dtype=torch.float64, requires_grad=True)
    n2 = squares(2.0, 3.0, 5.0)
    found = gpkit.GradientPenalty(form=make(c)).form(n2)
    apart = [1.0, -1.0, 2.5]
    assert found.tolist() == pytest.approx([value(d) for d in apart])
    of_c, of_n2 = torch.autograd.grad(found.sum(), (c, n2))
    assert of_c.tolist() == pytest.approx([-slope(d) for d in apart])
    true = [slope(d) / (2 * n) for d, n in zip(apart, (2.0, 3.0, 5.0), strict=True)]
    assert of_n2.tolist() == pytest.approx(true)
    with pytest.raises(ValueError, match="has 3 numbers, for 2 norms: give one for each norm"):
        make(c)(n2[:2])


def test_names():
    assert set(FORMS) == {"squared", "norm", "two_sided", "one_sided", "absolute", "power"}
    for name, form in FORMS.items():
        assert gpkit.GradientPenalty(form=name).form == form()
    with pytest.raises(ValueError, match=r"got 'two_side' \(did you mean 'two_sided'\?\)"):
        gpkit.GradientPenalty(form="two_side")
    with pytest.raises(TypeError, match=r"`form=...` must be one of .*'squared'.* got 2"):
        gpkit.GradientPenalty(form=2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gpkit.squared(norm="l3"), r"`squared\(norm=...\)` must be one of 'l2', 'l1'"),
        (lambda: gpkit.squared(norm="linv"), r"did you mean 'linf'\?"),
        (lambda: gpkit.squared(scale=0), r"`squared\(scale=...\)` must be a number > 0; got 0"),
        (lambda: gpkit.squared(scale=-1), "must be a number > 0; got -1"),
        (lambda: gpkit.two_sided("1"), r"`two_sided\(center=...\)` must be a number; got '1'"),
        (lambda: gpkit.one_sided(math.nan), r"`one_sided\(center=...\)` must be a number; got nan"),
        (lambda: gpkit.norm(eps=-1e-3), r"`norm\(eps=...\)` must be a number >= 0; got -0.001"),
        (
            lambda: gpkit.absolute(torch.ones(2, 3)),
            r"`absolute\(center=...\)`, a tensor, must be .* for each norm; got \[2, 3\]",
        ),
        (lambda: gpkit.power(0), r"`power\(exponent=...\)` must be a number > 0; got 0"),
        (lambda: gpkit.power(True), "must be a number > 0; got True"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()
