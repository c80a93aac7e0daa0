"""`check_penalty` names each hand-written bug, and passes right penalties and all presets."""

import copy

import penalties_by_hand as by_hand
import pytest
import torch
from scenes import squared_errors
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.doctor.gradcheck import PenaltyError
from gpkit.presets import PRESETS

B = 6


def images(outputs=1):
    """A smooth net with slopes from far below one to far above, and two kinds of images."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, outputs)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5)
    size = torch.tensor([0.05, 2.0, 0.5, 8.0, 1.0, 0.3]).reshape(B, 1, 1, 1)
    real, fake = torch.randn(2, B, 2, 3, 3)
    return net, real * size, fake * size.flip(0)


def points(outputs=1):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)), torch.randn(B, 3)


def labels(outputs=3):
    return torch.tensor([0, 2, 1, 1, 0, 2])


def failures(fn, net, *samples, **options):
    return gpkit.check_penalty(fn, net, *samples, raise_exception=False, **options).failures


def reference(fn, *args):
    """What `like=` is for a penalty by hand, from another source than itself."""
    losses = lambda net, y: lambda x: F.cross_entropy(net(x), y, reduction="none")  # noqa: E731
    return {
        by_hand.wgan_gp: gpkit.wgan_gp(),
        by_hand.r1: gpkit.r1(weight=1.0),
        by_hand.dragan: gpkit.dragan(),
        by_hand.laplacian: gpkit.laplacian(weight=1.0),
        by_hand.laplacian_func: by_hand.laplacian,
        by_hand.jacobian: gpkit.jacobian(weight=1.0),
        by_hand.jacobian_func: by_hand.jacobian,
        by_hand.jacobian_projected: gpkit.jacobian(weight=1.0),
        by_hand.weight_grad_norm: lambda net, x, y: gpkit.weight_grad_norm(weight=1.0)(
            lambda: F.cross_entropy(net(x), y), net
        ),
        by_hand.sum_of_losses: lambda net, x, y: gpkit.input_grad_norm()(losses(net, y), x),
    }[fn]


CRITICS = (by_hand.wgan_gp, by_hand.r1, by_hand.dragan)
FIELDS = (by_hand.laplacian, by_hand.laplacian_func)


@pytest.mark.parametrize(
    "like",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["alone", "like"],
)
@pytest.mark.parametrize(
    "fn",
    [
        *CRITICS,
        by_hand.laplacian,
        pytest.param(by_hand.laplacian_func, marks=pytest.mark.slow),
        by_hand.jacobian,
        pytest.param(by_hand.jacobian_func, marks=pytest.mark.slow),
        pytest.param(by_hand.jacobian_projected, marks=pytest.mark.slow),
        by_hand.weight_grad_norm,
        by_hand.sum_of_losses,
    ],
    ids=lambda fn: fn.__name__,
)
def test_right_penalties_pass(fn, like):
    if fn in FIELDS:
        net, x = points()
        samples = (x,)
    else:
        net, real, fake = images(1 if fn in CRITICS else 3)
        takes = fn.__code__.co_argcount - 1
        other = fake if fn in CRITICS else labels()
        samples = (real, other)[:takes]
    report = gpkit.check_penalty(fn, net, *samples, like=reference(fn) if like else None)
    checked = {check.name for check in report.checks if check.passed}
    assert {"float64", "gradient", "order", "zero", "side_effects", "autocast"} <= checked
    assert ("formula" in checked) == like
    assert {"samples", "entries"} <= checked or fn is by_hand.weight_grad_norm
    seen = isinstance(reference(fn), gpkit.GradientPenalty) if like else fn is by_hand.wgan_gp
    assert ("points" in checked) == seen


@pytest.mark.parametrize(
    ("fn", "scene", "alone", "like", "said"),
    [
        (by_hand.norm_over_channels, "pairs", "entries", gpkit.wgan_gp(), "norm over one axis"),
        (by_hand.one_alpha_for_the_batch, "pairs", "points", None, "one α for each sample"),
        (by_hand.one_alpha_an_entry, "pairs", "points", None, "not one for each entry"),
        (by_hand.norm_of_the_batch, "pairs", "samples", gpkit.wgan_gp(), "whole batch"),
        (by_hand.root_of_zero, "pairs", "zero", None, "epsilon inside"),
        (by_hand.no_create_graph, "pairs", "gradient", gpkit.wgan_gp(), "create_graph=True"),
        (by_hand.half_a_graph, "images", "gradient", gpkit.r1(2.0), "0.weight, 0.bias, 3.weight"),
        (by_hand.clean_instead_of_noised, "images", "noise", None, "noised tensor"),
        (by_hand.r1_of_clean, "pairs", None, by_hand.r1_of_noised, "another form, norm or point"),
        (by_hand.row_sums_of_the_hessian, "points", "entries", gpkit.laplacian(1.0), "Hessian"),
        (by_hand.mean_loss, "labels", "samples", by_hand.sum_of_losses, "factor 1/B"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_bug_is_named(fn, scene, alone, like, said):
    net, real, fake = images(3 if scene == "labels" else 1)
    if scene == "points":
        net, real = points()
    others = {"pairs": (fake,), "labels": (labels(),)}.get(scene, ())
    found = failures(fn, net, real, *others, like=like)
    alone = [alone] if alone else []
    assert list(found) == alone + (["formula"] if like else [])
    assert any(said in str(check) for check in found.values())


def test_noise_that_is_not_there_is_seen_against_dragan():
    net, real, _ = images()
    found = failures(by_hand.clean_instead_of_noised, net, real, like=gpkit.dragan())
    assert list(found) == ["points", "noise"]


@pytest.mark.parametrize(
    ("fn", "ok"),
    [
        (by_hand.r1, False),
        (by_hand.scaled_inner_gradient, True),
        (by_hand.outside_of_autocast, True),
        (lambda net, x: gpkit.r1(1.0)(net, real=x, scale=2.0**14), True),
    ],
    ids=["inside of autocast, unscaled", "scaled", "outside of autocast", "gpkit, scaled"],
)
def test_an_inner_gradient_that_underflows_in_float16(fn, ok):
    net, x, _ = images()
    found = failures(fn, net, x, autocast=torch.float16)
    assert list(found) == ([] if ok else ["autocast"])
    assert ok or "underflows" in str(found["autocast"])


def weight_scene(preset):
    """A preset in the weights, with the loss of a net and targets."""
    options = {"hessian": {"estimator": "exact"}, "fishr": {"weight": 1.0}}  # 0 at first
    act = PRESETS[preset](**options.get(preset, {}))

    def fn(net, x, target, env):
        if preset == "irm":
            return act(lambda: net(x), target.argmax(1), env)
        if preset == "fishr":
            return act(lambda: (net(x), x), target.argmax(1), env)
        if preset == "fisher":
            return act(lambda: net(x), net)
        errors = lambda: squared_errors(net(x), target)  # noqa: E731
        return act(errors if preset == "per_sample_grad_norm" else lambda: errors().mean(), net)

    net, x = points(3)
    return fn, net, (x, torch.randn(B, 3), torch.tensor([0, 1, 1, 0, 1, 0])), {}


def input_scene(preset):
    """A preset in the inputs."""
    apart = {"sigma": 0.3} if preset.startswith("approximate") else {}  # bfloat16 has no 0.01
    act = PRESETS[preset](**apart)
    net, real, fake = images(3)
    target = torch.randn(B, 3)
    if preset in ("input_grad_norm", "lipschitz_policy", "cure"):
        fn = lambda net, x, y: act(lambda x: squared_errors(net(x), y), x)  # noqa: E731
        return fn, net, (real, target), {}
    if preset == "sobolev":
        critic = images()[0]
        return act, critic, (real,), {"target": fake, "like": PRESETS[preset]()}
    if preset == "right_reasons":
        return act, net, (real,), {"metric": fake > 0, "like": PRESETS[preset]()}
    if preset == "contractive":
        return (
            PRESETS[preset](activation="1"),
            net,
            (real,),
            {"like": PRESETS[preset](activation="1")},
        )
    if preset in ("curvature", "laplacian", "eikonal"):
        return act, *(lambda net, x: (net, (x,)))(*points()), {"like": PRESETS[preset]()}
    if preset in ("jacobian", "spectral_jacobian", "duq", "path_length"):
        return act, net, (real,), {} if preset == "path_length" else {"like": PRESETS[preset]()}
    critic = images()[0]
    if preset in ("r1", "approximate_r1", "dragan"):
        fn = lambda net, x: act(net, real=x)  # noqa: E731
        return fn, critic, (real,), {"like": PRESETS[preset](**apart)}
    if preset in ("r2", "approximate_r2"):
        fn = lambda net, x: act(net, fake=x)  # noqa: E731
        return fn, critic, (fake,), {"like": PRESETS[preset](**apart)}
    fn = lambda net, x, y: act(net, real=x, fake=y)  # noqa: E731
    return fn, critic, (real, fake), {"like": PRESETS[preset]()}


WEIGHTS = {
    "weight_grad_norm", "per_sample_grad_norm", "fisher", "irm", "fishr", "hessian", "gnp", "sam",
}  # fmt: skip


QUICK = ("wgan_gp", "right_reasons")


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(PRESETS.keys() - {"none"})
    ],
)
def test_all_presets_pass(preset):
    fn, net, samples, options = (weight_scene if preset in WEIGHTS else input_scene)(preset)
    if preset in ("sam", "gnp"):  # their gradient is not that of their value, by definition
        options = {**options, "like": copy.deepcopy(fn)}
    gpkit.check_penalty(fn, net, *samples, **options)


class Conditional(nn.Module):
    """A critic with labels."""

    def __init__(self):
        super().__init__()
        self.first, self.labels, self.last = nn.Linear(4, 5), nn.Embedding(3, 5), nn.Linear(5, 1)

    def forward(self, x, y):
        return self.last((self.first(x) + self.labels(y)).tanh())


def conditional(critic, real, fake, y):
    z = by_hand.between(real, fake, by_hand.per_sample(real))
    g = by_hand.slope(lambda z: critic(z, y), z)
    return 10 * ((g.square().sum(1) + 1e-12).sqrt() - 1).square().mean()


def test_labels_several_calls_and_patches_are_compared_too():
    vectors = torch.randn(2, B, 4)
    checked = gpkit.check_penalty(
        conditional, Conditional(), *vectors, labels(), like=gpkit.wgan_gp()
    )
    assert {c.name: c.passed for c in checked.checks}["formula"] is True
    net, real, fake = images()
    both = lambda net, x, y: by_hand.r1(net, x) + by_hand.r1(net, y)  # noqa: E731
    gpkit.check_penalty(both, net, real, fake, like=gpkit.r1_r2(1.0))
    assert "formula" in failures(both, net, real, fake, like=gpkit.r1_r2(2.0))
    patches = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 1, 2))
    like = gpkit.wgan_gp(of=lambda scores: scores.flatten(1).sum(1))
    gpkit.check_penalty(by_hand.wgan_gp, patches, real, fake, like=like)


def test_fused_attention_stops_the_backward_pass_alone():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 1))
    found = failures(by_hand.r1, net, torch.randn(3, 3, 8), like=gpkit.r1(1.0))
    assert list(found) == ["backward"]
    assert "attention" in str(found["backward"])


def test_nothing_of_the_caller_changes():
    net, real, fake = images()
    net.insert(1, nn.BatchNorm2d(3))
    before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    penalty = gpkit.r1(seed=5)

    def fn(net, real, fake):
        alpha = torch.rand(len(real), 1, 1, 1, generator=generator)
        z = by_hand.between(real, fake, alpha.to(real))
        return by_hand.slope(net, z).flatten(1).square().sum(1).mean() + penalty(net, real=real)

    state = generator.get_state()
    assert list(failures(fn, net, real, fake)) == ["side_effects"]  # batch norm's, of its copy
    assert all(
        torch.equal(a, b)
        for a, b in zip(before[0].values(), net.state_dict().values(), strict=True)
    )
    assert torch.equal(before[1], torch.get_rng_state())
    assert torch.equal(state, generator.get_state())
    assert penalty.seed == 5
    assert penalty.draws == 0
    assert not real.requires_grad
    assert all(p.grad is None for p in net.parameters())


def in_place(critic, real):
    real.requires_grad_()
    by_hand.r1(critic, real).backward()
    torch.manual_seed(0)
    critic.eval()
    real.data.mul_(2)
    torch.randn(3)
    return by_hand.r1(critic, real)


def test_side_effects_are_named():
    net, real, _ = images()
    found = failures(in_place, net, real)
    said = str(found["side_effects"])
    for kind in (".grad of", "requires_grad of sample 0", "training of", "values of sample 0"):
        assert kind in said
    assert "seeds torch's generator" in said
    net.insert(1, nn.BatchNorm2d(3))
    said = str(failures(by_hand.r1, net, real)["side_effects"])
    assert "buffers of 1.running_mean, 1.running_var" in said or "1.num_batches_tracked" in said


def test_a_net_that_compares_samples_is_no_fault_of_the_penalty():
    class Deviation(nn.Module):  # as StyleGAN2's critic has it
        def forward(self, x):
            return torch.cat([x, x.std(0).mean().expand(len(x), 1)], 1)

    net, real, _ = images()
    net = nn.Sequential(*net[:3], Deviation(), nn.Linear(28, 1))
    report = gpkit.check_penalty(by_hand.r1, net, real)
    assert {c.name: c.passed for c in report.checks}["samples"] is None
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Tanh())
    net.append(nn.Flatten()).append(nn.Linear(3, 1))
    report = gpkit.check_penalty(by_hand.r1, net, real, skip=["side_effects"])
    assert {c.name: c.passed for c in report.checks}["samples"] is True  # in eval mode


def test_a_sum_a_state_a_batch_of_one_and_float32():
    net, real, _ = images()
    found = failures(lambda net, x: len(x) * by_hand.r1(net, x), net, real)
    assert "it is a sum over the samples" in str(found["samples"])
    calls = []

    def counted(net, x):
        calls.append(1)
        return by_hand.r1(net, x) * len(calls)

    assert list(failures(counted, net, real)) == ["repeatable"]

    def squeezed(net, x):
        g = by_hand.slope(net, x.detach().requires_grad_()).squeeze()
        return g.square().sum((1, 2, 3)).mean()

    assert "squeeze" in str(failures(squeezed, net, real)["samples"])

    def single(net, x):
        g = by_hand.slope(net, x.detach().requires_grad_())
        return 0.5 * (g.flatten(1).square() @ torch.ones(18, 1)).mean()

    found = failures(single, net, real, like=gpkit.r1(1.0))
    assert list(found) == ["float64"]  # and all others hold, in float32
    assert list(failures(lambda net, x: single(net, x).detach(), net, real)) == [
        "float64",
        "gradient",
    ]


def test_a_factor_is_told():
    net, real, _ = images()
    found = failures(by_hand.r1, net, real, like=gpkit.r1(weight=10.0))
    assert "it is 0.1 times like=" in str(found["formula"])


def test_the_error_names_all_failures_at_once():
    net, real, fake = images()

    def fn(*args):
        return by_hand.no_create_graph(*args) + by_hand.norm_of_the_batch(*args)

    with pytest.raises(PenaltyError, match=r"failed 2 of 13 checks:\ngradient .*") as e:
        gpkit.check_penalty(fn, net, real, fake)
    assert list(e.value.report.failures) == ["gradient", "samples"]
    assert e.value.report.to_dict()["ok"] is False
    assert "gradient      FAILED" in str(e.value.report)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        (lambda net, x: (lambda x: x, x), {}, TypeError, "must be a module"),
        (lambda net, x: (net.requires_grad_(False), x), {}, ValueError, "no parameter of the net"),
        (lambda net, x: (net, x[:1]), {}, ValueError, "B >= 2"),
        (lambda net, x: (net, x), {"skip": ["sample"]}, ValueError, "did you mean 'samples'"),
        (lambda net, x: (net, x), {"like": gpkit.weight_grad_norm()}, TypeError, "give a function"),
        (lambda net, x: (net, x), {"like": 3}, TypeError, "penalty or a function; got int"),
    ],
)
def test_refusals(arguments, options, error, said):
    net, real, _ = images()
    with pytest.raises(error, match=said):
        gpkit.check_penalty(by_hand.r1, *arguments(net, real), **options)


def test_a_penalty_that_returns_no_number():
    net, real, _ = images()
    with pytest.raises(TypeError, match=r"must return one real number; it returned Tensor \[6\]"):
        gpkit.check_penalty(
            lambda net, x: by_hand.slope(net, x.requires_grad_())[:, 0, 0, 0], net, real
        )
