"""Single calls on weights that FSDP2 has sharded: errors, other penalties beside, refusals."""

from functools import partial

import pytest
import ranks
import torch
import torch.nn.functional as F
from sharding import H, batches, frozen, halves, pair, sharded, slope, smooth, whole
from torch.distributed.fsdp import fully_shard

import gpkit
from gpkit.autodiff.random import random_state
from gpkit.autodiff.sharding.gathering import is_sharded
from gpkit.estimators.base import Recomputable
from gpkit.findings.sharding import findings_of_sharding
from gpkit.lightning.callback.sharded import ShardedWeights
from gpkit.needs import needs_of

pytestmark = pytest.mark.ddp


def fail(rank):
    """Let the second forward fail, and go on; train without a gradient; return what was said."""
    net = sharded(smooth(), reshard_after_forward=False)
    shards, penalties = ShardedWeights(net), {"p": pair()[0]}
    x, y = halves(batches(torch.float64)[0])[rank]
    before, calls, said = whole(net), [], {}

    def loss(fail=False):
        value = F.mse_loss(net(x), y)
        calls.append(value)
        if fail and len(calls) % 2 == 0:
            raise RuntimeError("out of luck")
        return value

    state = random_state(x.device)
    try:
        shards.terms(penalties, Recomputable(loss(), partial(loss, fail=True), state))
    except RuntimeError as error:
        said["failed"] = str(error)
    said["given back"] = all(before[n].equal(v) for n, v in whole(net).items())
    loss().backward()
    said["grads"] = {n: p.grad.full_tensor() for n, p in net.named_parameters()}
    net.zero_grad()
    try:
        shards.terms(penalties, Recomputable(loss().detach(), loss, state))
    except RuntimeError as error:
        said["detached"] = str(error)
    net.set_requires_gradient_sync(False)
    try:
        shards.terms(penalties, Recomputable(loss(), loss, state))
    except RuntimeError as error:
        said["not synchronised"] = str(error)
    return said


def both(rank):
    """The gradient of a loss, a penalty in the weights, and one in the inputs."""
    net, (x, y) = sharded(smooth()), halves(batches(torch.float64)[0])[rank]
    shards, state = ShardedWeights(net), random_state(x.device)
    in_inputs = gpkit.input_grad_norm(0.2, estimator=gpkit.finite_difference(H))

    def loss():
        return F.mse_loss(net(x), y)

    total, terms = shards.terms({"p": pair()[0]}, Recomputable(loss(), loss, state))
    total = total + terms["p"].penalty
    total = total + in_inputs(lambda z: (net(z) - y).square().squeeze(1), x)
    total.backward()
    return {n: p.grad.full_tensor() for n, p in net.named_parameters()}


GLOBAL = {"estimator": "finite_difference", "scope": "global"}

REFUSED = {
    "exact": gpkit.weight_grad_norm(scope="global"),
    "jets": gpkit.curvature(estimator="taylor"),
    "sampled": gpkit.weight_grad_norm(of="sampled_loss", **GLOBAL),
    "sample": gpkit.weight_grad_norm(scope="sample", estimator="finite_difference"),
    "adaptive": gpkit.weight_grad_norm(gpkit.gradient_share(0.1), **GLOBAL),
}

TAKEN = {
    "weight": gpkit.weight_grad_norm(estimator="finite_difference", scope="global"),
    "gnp": gpkit.gnp(scope="global"),
    "input": gpkit.input_grad_norm(estimator="finite_difference"),
    "logits": gpkit.irm(),
}


def said_of(net, penalties):
    needs = {name: needs_of(penalty) for name, penalty in penalties.items()}
    return [(f.penalty, str(f)) for f in findings_of_sharding(net, penalties, needs)]


def refused():
    """What is said of penalties, and of a net that is not sharded as a whole."""
    half_sharded = smooth()
    fully_shard(half_sharded[0])
    return {
        "refused": said_of(sharded(smooth()), REFUSED),
        "taken": said_of(sharded(smooth()), TAKEN),
        "frozen": said_of(sharded(frozen()), TAKEN),
        "half": said_of(half_sharded, TAKEN),
        "is_sharded": [is_sharded(smooth()), is_sharded(half_sharded)],
    }


def calls(rank):
    return {"errors": fail(rank), "both": both(rank), "said": refused()}


@pytest.fixture(scope="module")
def called():
    """What each process found in calls of its own."""
    return ranks.run(calls)


def test_gives_the_weights_back_after_an_error_and_goes_on(called):
    net, (x, y) = smooth(), batches(torch.float64)[0]
    F.mse_loss(net(x), y).backward()
    for known in called:
        assert known["errors"]["failed"] == "out of luck"
        assert known["errors"]["given back"]
        true = {n: p.grad for n, p in net.named_parameters()}
        torch.testing.assert_close(known["errors"]["grads"], true, rtol=1e-12, atol=1e-12)


def test_refuses_a_loss_without_gradients(called):
    for known in called:
        assert "the tensor has no graph" in known["errors"]["detached"]
        assert "set_requires_gradient_sync(True)" in known["errors"]["not synchronised"]


def test_goes_with_a_finite_difference_in_the_inputs(called):
    net, (x, y) = smooth(), batches(torch.float64)[0]
    params = list(net.parameters())

    def again():
        return torch.autograd.grad(F.mse_loss(net(x), y), params)

    def losses(z):
        return (net(z) - y).square().squeeze(1)

    base = again()
    slopes, n = slope(base, params, [True] * 6, again, "l2", H, "forward", torch.float64)
    z = x.clone().requires_grad_()
    (v,) = torch.autograd.grad(losses(z).sum(), z)
    v = v / v.norm(dim=1, keepdim=True)
    penalty = 0.2 * ((losses(x + H * v) - losses(x)) / H).square().mean()
    of_inputs = torch.autograd.grad(penalty, params)
    parts = zip(dict(net.named_parameters()), base, slopes, of_inputs, strict=True)
    true = {name: g + 0.1 * 2 * n * s + i for name, g, s, i in parts}
    for known in called:
        torch.testing.assert_close(known["both"], true, rtol=1e-12, atol=1e-12)


def test_says_what_cannot_be_and_what_to_use(called):
    said = called[0]["said"]
    ends = [
        "under FSDP, the trained shards are not in the graph that double backprop goes "
        "through; got exact(): use estimator='finite_difference', or DDP",
        "Taylor series do not pass through its hooks: use estimator='projection' or 'exact'",
        "of='loss' is needed; got of='sampled_loss': use DDP",
        "averaged over the processes; got scope='sample': use scope='global', or DDP",
        "the weight gradient_share() measures gradients, which needs DDP",
    ]
    assert len(said["refused"]) == len(ends)
    for (_, line), end in zip(said["refused"], ends, strict=True):
        assert line.endswith(end)
    assert said["refused"][0][0] == "exact"
    assert said["taken"] == said["frozen"] == []
    ((_, line),) = said["half"]
    assert "2.weight, 2.bias, 4.weight, 4.bias: apply fully_shard" in line
    assert said["is_sharded"] == [False, True]
