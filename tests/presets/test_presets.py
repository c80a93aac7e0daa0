"""Every row of the table: true value and gradient, per sample, and no trace in training."""

import copy
import pickle

import oracles
import pytest
import torch
from cases import ROWS, evaluated, expected, rows
from compare import gradients, relative_error
from scenes import B
from torch import nn

import gpkit
from gpkit.presets import PRESETS


def calls(row):
    return [row.call] if row.graph is None else [row.call, row.graph]


@rows()
def test_value_and_gradient_are_the_oracles(row):
    # catches norm(dim=1) on images, the batch's norm, a 1/B too many or too few, a factor of a
    # half, a forgotten weight, and a forgotten create_graph
    for call in calls(row):
        s = row.scene()
        terms, z = evaluated(row, s, call)
        norms, values, penalty, gradient = expected(row, s, z)
        groups = B * row.points if row.per_sample else row.groups
        for term, n, v in zip(terms, norms, values, strict=True):
            assert term.norms.shape == term.values.shape == (groups,)
            assert relative_error(term.norms, n) < 1e-10
            assert relative_error(term.values, v) < 1e-10
            assert term.penalty == term.weight * row.reduce(term.values)
        total = call(row.build(), s)
        if row.where not in (("between",), ("near",)):  # the points are other ones at the next call
            assert relative_error(total, penalty) < 1e-10
        assert relative_error(sum(t.penalty for t in terms), penalty) < 1e-10
        found = gradients(sum(t.penalty for t in terms), s.net)
        assert relative_error(found, gradient) < 1e-10


@rows(lambda row: row.where == ("real",) and row.per_sample)
def test_the_shared_input_tells_the_classic_bugs_from_the_truth(row):
    s = row.scene()
    _, z = evaluated(row, s)
    ((true,), _, penalty, _) = expected(row, s, z)
    assert true.max() > 1.2 * true.min()  # unequal slopes
    batch = true.square().sum().sqrt(), true.square().mean().sqrt()
    assert all(abs(n / true - 1).min() > 1e-3 for n in batch)
    assert penalty > 0.01  # a factor 1/B, or B, is seen
    if s.real.ndim == 4 and row.name == "eikonal":  # norm(dim=1) on images
        assert true.min() < 1 < true.max()
        wrong = oracles.derivative(lambda x: s.apply(s.params, x[None])[0, 0], 1, z[0]).norm(dim=1)
        assert relative_error(wrong.square().mean(), true.square().mean()) > 0.1


@rows()
def test_evaluated_where_the_formula_says(row):
    # catches one alpha for the whole batch, alpha per channel or pixel, and extrapolation
    s = row.scene()
    penalty = row.build()
    evaluated(row, s, penalty=penalty)  # the first time runs what is run again once more
    _, z = evaluated(row, s, penalty=penalty)
    assert len(z) == len(row.where)
    for points, where in zip(z, row.where, strict=True):
        if where == "near":
            assert not torch.equal(points, s.real)
            assert ((points - s.real).abs() <= 0.5 * s.real.std(correction=0)).all()
        if where in ("near", "noisy", "moved"):  # of what was moved, the value tells where to
            continue
        if where != "between":
            kinds = [getattr(s, kind) for kind in where.split("+")]
            assert torch.equal(points, torch.cat(kinds))
            continue
        alpha = ((points - s.fake) / (s.real - s.fake)).flatten(1)  # [B, n]
        torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))
        assert alpha[:, 0].unique().numel() == B
        assert (alpha > 0).all()
        assert (alpha < 1).all()
        assert alpha[:, 0].std() > 0.05


@rows(lambda row: "between" in row.where or row.drawn)
def test_random_points_are_others_at_every_call(row):
    s, penalty = row.scene(), row.build()
    _, first = evaluated(row, s, penalty=penalty)
    row.call(penalty, s)  # draws what the terms have shown; the next call draws others
    _, second = evaluated(row, s, penalty=penalty)
    assert not torch.equal(first[-1], second[-1])


@rows(lambda row: row.graph is not None)
def test_tensor_route_equals_callable_route(row):
    s = row.scene()
    called, graph = row.call(row.build(), s), row.graph(row.build(), s)
    torch.testing.assert_close(called, graph, rtol=1e-12, atol=0)
    pair = gradients(called, s.net), gradients(graph, s.net)
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12 * pair[0].norm())


@rows()
def test_forwards(row):
    # one for a callable; none but the caller's own where the graph is there
    s = row.scene()
    for call in calls(row):
        penalty = row.build()
        call(penalty, s)  # the first call runs what is run again once more, to compare
        s.net.seen.clear()
        call(penalty, s)
        assert len(s.net.seen) == len(row.where)


@rows(lambda row: row.consistent)
def test_gradcheck_twice(row):
    # catches a detach or an in-place write anywhere between the parameters and the value
    s, penalty = row.scene(), row.build()
    names = list(s.params)

    def value(*params):
        s.given = dict(zip(names, params, strict=True))
        return row.call(copy.deepcopy(penalty), s)  # a copy has the same draws

    params = [p.requires_grad_() for p in s.params.values()]
    assert torch.autograd.gradcheck(value, params, fast_mode=True)
    assert not row.twice or torch.autograd.gradgradcheck(value, params, fast_mode=True)


@rows(lambda row: row.per_sample and row.reduce is torch.mean and not row.drawn)
def test_halves_of_the_batch_make_the_whole(row):
    # catches a hidden 1/B, and samples that see each other
    s = row.scene()
    s.fake = s.real  # then all interpolates are the samples themselves
    whole = row.call(row.build(), s)
    parts = [row.call(row.build(), s.part(part)) for part in (slice(2), slice(2, B))]
    assert relative_error((2 * parts[0] + 3 * parts[1]) / B, whole) < 1e-12


@rows()
def test_a_zero_gradient_is_harmless(row):
    # catches the NaN of d sqrt(n²) at zero
    s = row.scene(zero=True)
    for call in calls(row):
        terms, z = evaluated(row, s, call)
        for term, oracle in zip(terms, row.oracles, strict=True):
            _, n, v = oracle(s, s.params, z)
            # L is convex in b, labels that are drawn leave it no zero, and a target is none
            convex = row.name in ("weight_grad_norm_order2", "hessian", "fisher", "sobolev")
            assert bool(n.any()) == convex
            torch.testing.assert_close((term.norms, term.values), (n, v))
        penalty = call(row.build(), s)
        assert gradients(penalty, s.net).isfinite().all()


@rows()
@pytest.mark.parametrize("training", [True, False])
def test_no_side_effects(row, training):
    # catches batch statistics updated twice, a shifted random stream, and a touched .grad
    s = row.scene(stateful=True)
    s.net.train(training)
    s.net[0].bias.requires_grad_(False)  # frozen, and to stay so
    s.net[0].weight.grad = torch.full_like(s.net[0].weight, 7.0)
    user = [s.real, s.fake, s.target]
    before = copy.deepcopy(s.net.state_dict()), copy.deepcopy(user), torch.get_rng_state()
    buffers = {name: id(buffer) for name, buffer in s.net.named_buffers()}
    gradients_of = {name: p.requires_grad for name, p in s.net.named_parameters()}

    row.call(row.build().terms, s)

    after = s.net.state_dict(), user, torch.get_rng_state()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert {name: id(buffer) for name, buffer in s.net.named_buffers()} == buffers
    assert {name: p.requires_grad for name, p in s.net.named_parameters()} == gradients_of
    assert [name for name, p in s.net.named_parameters() if p.grad is not None] == ["0.weight"]
    assert (s.net[0].weight.grad == 7).all()
    assert all(m.training == training for m in s.net.modules())
    assert not any(x.requires_grad or x.grad is not None for x in user)


@rows(lambda row: not row.drawn)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_are_in_float32_or_better(row, dtype):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.03}[dtype]
    exact, s = row.scene(), row.scene(dtype=dtype)
    exact.fake, s.fake = exact.real, s.real  # no interpolation
    terms, _ = evaluated(row, s)
    for term, true in zip(terms, evaluated(row, exact)[0], strict=True):
        assert term.norms.dtype == term.values.dtype == term.penalty.dtype == torch.float32
        assert relative_error(term.norms.double(), true.norms) < tolerance


@rows()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_draws_the_same(row, duplicate):
    s, penalty = row.scene(), row.build()
    row.call(penalty, s)
    twin = duplicate(penalty)
    assert repr(twin) == repr(penalty)
    assert [row.call(penalty, s) for _ in range(2)] == [row.call(twin, s) for _ in range(2)]


@pytest.mark.filterwarnings("ignore:.*random estimate of n²")
@rows()
def test_state_resumes_the_same_draws(row):
    # a checkpoint of plain numbers, which loads in a process of another global seed
    s, fixed = row.scene(), row.name.endswith(("l1", "linf")) or row.groups > 1
    axes = {} if fixed else {"estimator": "projection"}
    penalty, resumed = row.build(**axes), row.build(**axes)
    row.call(penalty, s)
    state = copy.deepcopy(penalty.state_dict())
    following = [row.call(penalty, s) for _ in range(2)]
    torch.manual_seed(1234)
    resumed.load_state_dict(state)
    assert [row.call(resumed, s) for _ in range(2)] == following
    assert resumed.state_dict() == penalty.state_dict()


@rows()
def test_every_and_weight_are_the_users(row):
    s = row.scene()
    s.fake = s.real
    plain, lazy = row.build(), row.build(every=3)
    values = [row.call(lazy, s) for _ in range(6)]
    assert [bool(value) for value in values] == [True, False, False] * 2
    if row.drawn:  # other points at each call: the first of each penalty are the same
        assert relative_error(values[0], 3 * row.call(plain, s)) < 1e-12
        return
    assert relative_error(sum(values) / 6, row.call(plain, s)) < 1e-12


def test_every_preset_is_in_the_table():
    missing = [name for name in PRESETS if not any(row.name.startswith(name) for row in ROWS)]
    assert missing == ["none"]


def test_none_evaluates_nothing():
    def fail(x):
        raise AssertionError

    assert gpkit.none()(fail, torch.zeros(B, 2)) == 0
    assert gpkit.none(weight=2.0, order=2)(fail, torch.zeros(B, 2)) == 0  # for a sweep


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("preset", [gpkit.eikonal, gpkit.wgan_gp, gpkit.wgan_lp])
def test_center(preset, scale):
    x = torch.ones(B, 1)
    value = preset(weight=2.0, center=1.5, at="data")(lambda x: scale * x, x)
    distance = max(0, scale - 1.5) if preset is gpkit.wgan_lp else scale - 1.5
    assert value.item() == pytest.approx(2 * distance**2)


def test_match_chooses_parameters_by_name():
    # catches a pattern that is ignored, and one that is matched from the start only
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.randn(B, 3, dtype=torch.float64)
    whole = gpkit.weight_grad_norm(weight=1.0)(lambda: net(x).square().mean(), net)
    parts = [
        gpkit.weight_grad_norm(weight=1.0, match=match)(lambda: net(x).square().mean(), net)
        for match in ("0.*", "2.weight", "2.b*")
    ]
    assert parts[0] != parts[1] != parts[2]
    torch.testing.assert_close(sum(parts), whole)
