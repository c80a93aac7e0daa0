"""What `check_penalty` takes: labels, several calls, states, odd nets; and what it leaves alone."""

import copy

import penalties_by_hand as by_hand
import pytest
import torch
from checked import B, failures, images, labels
from torch import nn

import gpkit
from gpkit.doctor.gradcheck import PenaltyError


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
