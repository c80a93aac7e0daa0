"""Single calls with FSDP2: a policy of precision, errors in between, what is refused."""

import warnings

import pytest
import ranks
import torch
from sharded_critics import (
    GAMMA,
    B,
    Critic,
    adversarial,
    data,
    half,
    r1_by_hand,
    r1_r2_by_hand,
    sharded,
    slopes,
)
from sharding import BFLOAT16
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

import gpkit
from gpkit.autodiff.sharding.compat import Resharding

pytestmark = pytest.mark.ddp


def first(rank, dtype=torch.float64):
    real, fake = data(dtype)
    return half(real[0], rank), half(fake[0], rank)


def gradients(critic):
    found = {n: p.grad for n, p in critic.named_parameters()}
    return {n: g if g is None else g.full_tensor() for n, g in found.items()}


def kinds(critic):
    return {type(p).__name__ for p in critic.parameters()}


def by_hand(total=r1_r2_by_hand):
    critic = Critic()
    real, fake = data()
    total(critic, real[0], fake[0], 0).backward()
    return {n: p.grad for n, p in critic.named_parameters()}


def largest(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


def in_bfloat16(rank):
    critic = sharded(Critic(torch.float32), mp_policy=BFLOAT16)
    real, fake = first(rank, torch.float32)
    penalty = gpkit.r1(GAMMA)
    (adversarial(critic, real, fake) + penalty(critic, real=real)).backward()
    return gradients(critic), penalty.terms(critic, real=real).norms.dtype


def test_a_policy_of_bfloat16_is_the_same_by_hand():
    """Each half by hand with weights and inputs in bfloat16, and the mean of the gradients."""
    means = None
    for rank in range(ranks.RANKS):
        critic = Critic(torch.float32)
        low = {n: p.detach().bfloat16().requires_grad_() for n, p in critic.named_parameters()}
        real, fake = first(rank, torch.float32)

        def f(x, critic=critic, low=low):
            return functional_call(critic, low, x.bfloat16())

        (adversarial(f, real, fake) + GAMMA / 2 * slopes(f, real).mean()).backward()
        grads = {n: p.grad.float() / ranks.RANKS for n, p in low.items()}
        means = grads if means is None else {n: means[n] + g for n, g in grads.items()}
    exact = by_hand(r1_by_hand)
    for found, dtype in ranks.run(in_bfloat16):
        assert dtype == torch.float32  # norms
        assert largest(found, means) < 2e-3
        assert 1e-2 < largest(found, exact) < 0.5  # it is bfloat16


class Unlucky(gpkit.Form):
    """A form that fails on request."""

    fails = True

    def value(self, squared_norms):
        if self.fails:
            raise ValueError("out of luck")
        return squared_norms


def after_an_error(rank):
    """The gradients after an error in a penalty, and after one in a backward pass."""
    real, fake = first(rank)
    critic, found, fails = sharded(Critic()), [], []
    # In the midst of a backward pass, after some blocks and before others.

    def arm(module, args, output):
        output.register_hook(lambda _: 1 / 0 if fails else None)

    critic.blocks[0].register_forward_hook(arm)
    unlucky = gpkit.GradientPenalty(form=Unlucky())
    for where in ("penalty", "form", "backward"):
        try:
            with gpkit.unsharded(critic):
                x = real.clone().requires_grad_()
                g = gpkit.derivative(critic(x), x)
                if where == "penalty":
                    raise ValueError("out of luck")
                if where == "form":
                    unlucky(critic, real)
                fails.append(True)
                g.square().sum().backward()
        except (ValueError, ZeroDivisionError):
            found.append(kinds(critic))
    fails.clear()
    try:
        unlucky(critic, real)
    except ValueError:
        found.append(kinds(critic))
    critic.zero_grad()
    penalty = gpkit.r1_r2(GAMMA)
    (adversarial(critic, real, fake) + penalty(critic, real=real, fake=fake)).backward()
    return found, kinds(critic), gradients(critic)


def test_weights_are_sharded_again_after_an_error():
    for found, at_end, grads in ranks.run(after_an_error):
        assert found == [{"DTensor"}] * 4
        assert at_end == {"DTensor"}
        assert largest(grads, by_hand()) < 1e-14


def settings(critic):
    resharding = Resharding(critic.modules())
    return [(after, forward) for *_, after, forward in resharding.before]


def what_is_set(rank):
    """What is set for the modules before and after; and where the user keeps weights gathered."""
    real, fake = first(rank)
    fresh = sharded(Critic())
    with gpkit.unsharded(fresh):  # before the first forward of all
        adversarial(fresh, real, fake).backward()
    used = sharded(Critic())
    adversarial(used, real, fake).backward()
    plain = settings(used)
    gpkit.r1(GAMMA)(used, real=real).backward()
    kept = sharded(Critic())
    kept.set_reshard_after_backward(False)
    gpkit.r1(GAMMA)(kept, real=real).backward()
    looked = sharded(Critic())
    gpkit.r1(GAMMA).terms(looked, real=real)
    return [
        settings(fresh) == plain,
        settings(used) == plain,
        [after for after, _ in settings(kept)],
        kinds(kept),
        kinds(looked),
    ]


def test_what_the_user_has_set_stays():
    for fresh, used, after, kept, looked in ranks.run(what_is_set):
        assert fresh
        assert used
        assert after == [False] * 4
        assert kept == {"Parameter"}  # as after any backward pass with that setting
        assert looked == {"DTensor"}


def of_one_variable():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    return net.double(), torch.linspace(-2, 2, B, dtype=torch.float64).reshape(-1, 1)


def along_directions(rank):
    """Of one variable, the squares of random signs are 1: the estimators have no error."""
    found = {}
    for name, options in {"jvp": {}, "trace": {"order": 2}}.items():
        net, x = of_one_variable()
        for layer in (net[0], net[2]):
            fully_shard(layer)
        fully_shard(net)
        penalty = gpkit.GradientPenalty(estimator=name, weight=GAMMA, **options)
        penalty(net, half(x, rank)).backward()
        found[name] = gradients(net), kinds(net)
    return found


def test_forward_mode_and_the_trace_of_the_hessian():
    for found in ranks.run(along_directions):
        for name in ("jvp", "trace"):
            net, x = of_one_variable()
            x.requires_grad_()
            (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            if name == "trace":
                (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
            (GAMMA * g.square().mean()).backward()
            grads, at_end = found[name]
            assert at_end == {"DTensor"}
            true = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
            assert len(true) == 3
            assert largest({n: grads[n] for n in true}, true) < 1e-14


def refused(rank):
    real, fake = first(rank)
    critic, whole = sharded(Critic()), sharded(Critic(), "whole")
    whole(real)  # its weights stay gathered
    exact = gpkit.weight_grad_norm(0.1)
    share = gpkit.r1(gpkit.gradient_share(0.1))

    def measured():
        loss = adversarial(critic, real, fake)
        share.measure(loss, share.act(critic, real=real), critic.parameters())

    def of_a_derivative():
        """Penalise a derivative that torch has taken."""
        x = real.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return gpkit.input_grad_norm()(g.flatten(1).square().sum(1), x)

    calls = {
        "graph": lambda: exact(adversarial(critic, real, fake), critic.parameters()),
        "module": lambda: exact(lambda: adversarial(critic, real, fake), critic),
        "gathered": lambda: exact(adversarial(whole, real, fake), whole.parameters()),
        "with_loss": lambda: exact.with_loss(lambda: adversarial(critic, real, fake), critic),
        "difference": lambda: gpkit.gnp()(lambda: adversarial(critic, real, fake), critic),
        "share": measured,
        "taylor": lambda: gpkit.curvature(estimator="taylor")(critic, real),
        "derivative": of_a_derivative,
    }
    said = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    with gpkit.unsharded(critic):
        of_a_derivative().backward()
    return said, gradients(critic)


WHOLE = (
    "RuntimeError: {} needs whole weights, and FSDP2 has sharded them: use a penalty in the "
    "inputs, gpkit.GradientPenaltyCallback with estimator='finite_difference' and scope='global', "
    "or DistributedDataParallel"
)


def test_what_needs_whole_weights_is_refused_in_one_line():
    for said, grads in ranks.run(refused):
        for name in ("graph", "module", "gathered", "with_loss", "difference"):
            assert said[name] == WHOLE.format("a penalty in the weights")
        assert said["share"] == WHOLE.format("gradient_share()")
        assert said["taylor"] == (
            "RuntimeError: `estimator=taylor()` runs the net on Taylor series, which do not pass "
            "through the hooks of FSDP2: use estimator='projection' or 'exact'"
        )
        assert said["derivative"].startswith(
            "ExplainedError: FSDP2 has freed weights that this derivative needs: run the forward "
            "pass, the penalty and the backward pass within gpkit.unsharded(net)"
        )
        assert grads["blocks.1.qkv.weight"].norm() > 1e-3  # in that context it is taken
