"""Two processes with FSDP2: as one process with the whole batch, by a loop written by hand."""

import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Subset, TensorDataset

import gpkit
from gpkit.autodiff.random import random_state
from gpkit.estimators.base import Recomputable
from gpkit.lightning.callback.sharded import ShardedWeights, findings_of_sharding, is_sharded

B, STEPS, H = 8, 4, 0.01
SGD, ADAM = partial(torch.optim.SGD, lr=0.05, momentum=0.9), partial(torch.optim.Adam, lr=0.01)
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def smooth(dtype=torch.float64):
    """Odd sizes, so that shards differ in size, and a single number, so that one is empty."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)
    return nn.Sequential(*layers).to(dtype)


def single():
    return smooth(torch.float32)


def large():
    """Weights above one, to which the default step is in proportion."""
    net = smooth()
    with torch.no_grad():
        for p in net.parameters():
            p *= 8
    return net


def frozen():
    net = smooth()
    net[2].requires_grad_(False)
    return net


def noisy():
    """Batch norm and dropout: what a second forward must not disturb, and must repeat."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 1)
    return nn.Sequential(*layers).double()


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def pair(weight=0.1, match="*", norm="l2", c=None, step=H, side="forward", every=1):
    """A penalty, and what the loop by hand needs to know of it; c is the centre, None for n²."""
    penalty = gpkit.GradientPenalty(
        of="loss",
        wrt=gpkit.weights(match),
        scope="global",
        form=gpkit.squared(norm=norm) if c is None else gpkit.two_sided(c, norm=norm),
        estimator=gpkit.finite_difference(step, side=side),
        weight=weight,
        every=every,
    )
    return penalty, (weight, match.rstrip("*"), norm, c or 0.0, step, side, every)


# name: net, penalties, optimiser, keywords of fully_shard
CASES = {
    "SGD": (smooth, [pair()], SGD, {}),
    "Adam": (smooth, [pair()], ADAM, {}),
    "float32, SGD": (single, [pair(step=0.1)], SGD, {}),
    "float32, Adam": (single, [pair(step=0.1)], ADAM, {}),
    "bfloat16 policy": (single, [pair(step=None)], SGD, {"mp_policy": BFLOAT16}),
    "default step": (smooth, [pair(step=None)], SGD, {}),
    "default step, large": (large, [pair(1e-3, step=None)], SGD, {}),
    "default step, central": (smooth, [pair(step=None, side="central")], SGD, {}),
    "backward": (smooth, [pair(side="backward")], SGD, {}),
    "central": (smooth, [pair(side="central")], SGD, {}),
    "two-sided": (smooth, [pair(c=0.5)], SGD, {}),
    "l1": (smooth, [pair(norm="l1", weight=0.01)], SGD, {}),
    "linf": (smooth, [pair(norm="linf")], SGD, {}),
    "some weights": (smooth, [pair(match="2.*")], SGD, {}),
    "two penalties": (smooth, [pair(), pair(0.3, match="0.*", c=0.2)], SGD, {}),
    "every second step": (smooth, [pair(every=2)], SGD, {}),
    "tied": (Tied, [pair()], SGD, {}),
    "frozen": (frozen, [pair()], SGD, {}),
    "gathered until the backward": (smooth, [pair()], SGD, {"reshard_after_forward": False}),
    "gathered for good": (smooth, [pair()], SGD, {"reshard_after_backward": False}),
    "copies on both": (smooth, [pair()], SGD, {"mesh": (ranks.RANKS, 1)}),
    "batch norm and dropout": (noisy, [pair()], SGD, {}),
}
# Sums are taken in another order; the step divides the rounding by itself, and 2√ε is a small one.
TOLERANCES = {"float32, SGD": 1e-6, "float32, Adam": 1e-6, "bfloat16 policy": 1e-6}
TOLERANCES |= {"default step": 1e-7, "default step, large": 1e-7, "default step, central": 1e-9}
PASSES = {"central": 3, "default step, central": 3, "two penalties": 3}


def data(dtype):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * B, 5, generator=rng, dtype=torch.float64).to(dtype)
    return x, x[:, :1] ** 2


def batches(dtype):
    return list(zip(*(t.split(B) for t in data(dtype)), strict=True))


def halves(batch):
    size = B // ranks.RANKS
    return [[t[rank * size :][:size] for t in batch] for rank in range(ranks.RANKS)]


def sharded(net, reshard_after_backward=True, **options):
    """Shard every layer that has weights, and the whole; tied weights need to be in one group."""
    if "mesh" in options:
        options["mesh"] = init_device_mesh("cpu", options["mesh"], mesh_dim_names=("copy", "shard"))
    layers = [] if isinstance(net, Tied) else [m for m in net.children() if list(m.parameters())]
    for module in [*layers, net]:
        fully_shard(module, **options)
    net.set_reshard_after_backward(reshard_after_backward)
    return net


def whole(net):
    """The values of a net whose shards lie on both processes."""
    values = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    full = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in values.items()}
    return {n: v.detach().clone() for n, v in full.items()}


def train(name, rank):
    """Train a net on two processes, in a plain loop; return what it became."""
    make, pairs, optimizer, options = copy.deepcopy(CASES[name])
    net = sharded(make(), **options)
    optimizer = optimizer([p for p in net.parameters() if p.requires_grad])
    penalties = {str(i): penalty for i, (penalty, _) in enumerate(pairs)}
    shards, passes, values, untouched = ShardedWeights(net), [], [], []
    torch.manual_seed(rank)  # of dropout
    for step, batch in enumerate(batches(next(net.parameters()).dtype)):
        passes.append([])

        mine = halves(batch)[rank]

        def loss(mine=mine, seen=passes[-1]):
            seen.append("forward")
            value = F.mse_loss(net(mine[0]), mine[1])
            value.register_hook(lambda _: seen.append("backward"))
            return value

        before = random_state(batch[0].device)
        old = [p.grad if p.grad is None else p.grad.to_local().clone() for p in net.parameters()]
        total, terms = shards.terms(penalties, Recomputable(value := loss(), loss, before), step)
        new = [p.grad if p.grad is None else p.grad.to_local() for p in net.parameters()]
        untouched.append(total is value or any(terms.values()))
        untouched.append(all((a is b is None) or a.equal(b) for a, b in zip(old, new, strict=True)))
        values.append([term.penalty.item() for term in terms.values() if term is not None])
        optimizer.zero_grad()
        (total + sum(term.penalty for term in terms.values() if term is not None)).backward()
        optimizer.step()
    return {"net": whole(net), "passes": passes, "values": values, "untouched": all(untouched)}


def by_hand(name):
    """Train the same net on one process: torch.autograd and the formula, no more."""
    make, pairs, optimizer, options = CASES[name]
    net = make()
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    dtype = next(net.parameters()).dtype
    compute = torch.bfloat16 if options.get("mp_policy") else dtype
    optimizer = optimizer(named.values())
    streams = [torch.Generator().manual_seed(rank).get_state() for rank in range(ranks.RANKS)]
    buffers = [copy.deepcopy(dict(net.named_buffers())) for _ in range(ranks.RANKS)]
    by_halves = make is noisy or compute != dtype  # samples that meet, or rounding that shows
    values = []

    def gradients(batch, *, keep=False):
        """Of the mean loss of the whole batch, or the mean of the gradients of its halves."""
        total = [torch.zeros_like(p) for p in named.values()]
        for rank, (x, y) in enumerate(halves(batch) if by_halves else [batch]):
            torch.set_rng_state(streams[rank])
            own = copy.deepcopy(buffers[rank])
            state = {n: p.to(compute) for n, p in net.named_parameters()} | own
            loss = F.mse_loss(torch.func.functional_call(net, state, (x.to(compute),)), y)
            for t, g in zip(total, torch.autograd.grad(loss, named.values()), strict=True):
                t += g / (ranks.RANKS if by_halves else 1)
            if keep:
                streams[rank], buffers[rank] = torch.get_rng_state(), own
        return total

    for step, batch in enumerate(batches(dtype)):
        again = partial(gradients, batch)
        base = total = gradients(batch)
        values.append([])
        for _, (weight, prefix, norm, c, h, side, every) in pairs:
            if step % every == 0:
                chosen = [n.startswith(prefix) for n in named]
                slopes, n = slope(base, list(named.values()), chosen, again, norm, h, side, compute)
                factor = weight * every * 2 * (n - c)  # the slope of λ (n - c)² in n
                total = [t + factor * s for t, s in zip(total, slopes, strict=True)]
                values[-1].append((weight * every * (n - c) ** 2).item())
        gradients(batch, keep=True)  # what a training step leaves behind
        for p, g in zip(named.values(), total, strict=True):
            p.grad = g
        optimizer.step()
    return {n: p.detach() for n, p in net.named_parameters()}, buffers, values


def slope(base, params, chosen, again, norm, h, side, compute):
    """∇n ≈ (∇L(θ + hv) - ∇L(θ)) / h for n = ‖∇L‖ of the chosen weights, and n."""
    flat = torch.cat([g.reshape(-1) for g, c in zip(base, chosen, strict=True) if c])
    moved = [p for p, c in zip(params, chosen, strict=True) if c]
    n = flat.norm(p={"l1": 1, "l2": 2, "linf": torch.inf}[norm])
    v = {"l1": flat.sign(), "l2": flat / n, "linf": flat.sign() * (flat.abs() == n)}[norm]
    if h is None:
        size = torch.cat([p.detach().reshape(-1) for p in moved]).square().mean().sqrt().item()
        eps = torch.finfo(compute).eps
        h = (eps ** (1 / 3) / 2 if side == "central" else 2 * eps**0.5) * max(1.0, size)
    h = h / v.norm()

    def at(sign):
        kept = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p, part in zip(moved, v.split([p.numel() for p in moved]), strict=True):
                p += sign * h * part.reshape(p.shape)
        grads = again()
        with torch.no_grad():
            for p, old in zip(moved, kept, strict=True):
                p.copy_(old)
        return grads

    low = base if side == "forward" else at(-1)
    high = base if side == "backward" else at(1)
    width = 2 * h if side == "central" else h
    return [(b - a) / width for a, b in zip(low, high, strict=True)], n


class Net(pl.LightningModule):
    """A module that knows nothing of penalties; it logs, and shards itself."""

    steps = 0  # of all of them

    def __init__(self):
        super().__init__()
        self.net = single()

    def configure_model(self):
        if not is_sharded(self):
            sharded(self.net)

    def training_step(self, batch, batch_idx):
        Net.steps += 1
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self):
        return SGD(self.parameters())


def fit(rank, penalty=None):
    """Train with Lightning's own strategy and gpkit's callback, the gradient clipped."""
    module = Net()
    part = Subset(TensorDataset(*data(torch.float32)), range(rank, STEPS * B, ranks.RANKS))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks.RANKS,
        strategy=ModelParallelStrategy(data_parallel_size=ranks.RANKS, tensor_parallel_size=1),
        use_distributed_sampler=False,
        max_epochs=1,
        gradient_clip_val=0.3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[gpkit.GradientPenaltyCallback(penalty or pair(step=0.1)[0])],
    )
    trainer.fit(module, DataLoader(part, B // ranks.RANKS))
    return whole(module.net)


def fit_refused(rank):
    """What is said at the start of fits with penalties that FSDP cannot have, before any step."""
    said, steps = [], Net.steps
    for penalty in (gpkit.weight_grad_norm(), gpkit.input_grad_norm()):
        try:
            fit(rank, penalty)
        except ValueError as error:
            said.append(str(error))
    assert Net.steps == steps
    return said


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
    "projected": gpkit.jacobian(),
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


def refused():
    """What is said of penalties, and of a net that is not sharded as a whole."""
    half_sharded = smooth()
    fully_shard(half_sharded[0])
    return {
        "refused": findings_of_sharding(sharded(smooth()), REFUSED),
        "taken": findings_of_sharding(sharded(smooth()), TAKEN),
        "frozen": findings_of_sharding(sharded(frozen()), TAKEN),
        "half": findings_of_sharding(half_sharded, TAKEN),
        "is_sharded": [is_sharded(smooth()), is_sharded(half_sharded)],
    }


def work(rank):
    known = {name: train(name, rank) for name in CASES}
    return known | {
        "Lightning": fit(rank),
        "refused": fit_refused(rank),
        "errors": fail(rank),
        "both": both(rank),
        "said": refused(),
    }


@pytest.fixture(scope="module")
def found():
    """What each process knows at the end."""
    return ranks.run(work)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process_with_the_whole_batch(found, name):
    true, buffers, values = by_hand(name)
    tolerance = TOLERANCES.get(name, 1e-12)
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for rank, known in enumerate(found):
        close(known[name]["net"], true | buffers[rank])
        close(known[name]["values"], values)
        assert known[name]["untouched"]


@pytest.mark.parametrize("name", CASES)
def test_takes_two_forward_and_backward_passes(found, name):
    for known in found:
        for step, passes in enumerate(known[name]["passes"]):
            count = 1 if name == "every second step" and step % 2 else PASSES.get(name, 2)
            assert passes[: 2 * count - 1] == (["forward", "backward"] * count)[: 2 * count - 1]
            assert len(passes) <= 2 * count


def test_trains_in_lightning_as_one_process(found):
    net = single()
    params, optimizer = list(net.parameters()), SGD(net.parameters())
    x, y = data(torch.float32)
    for step in range(STEPS):
        x_, y_ = (t[step * B :][:B] for t in (x, y))

        def again(x=x_, y=y_):
            return torch.autograd.grad(F.mse_loss(net(x), y), params)

        base = again()
        slopes, n = slope(base, params, [True] * 6, again, "l2", 0.1, "forward", torch.float32)
        total = [g + 0.1 * 2 * n * s for g, s in zip(base, slopes, strict=True)]
        length = torch.cat([t.reshape(-1) for t in total]).norm()
        assert length > 0.3  # or nothing is clipped
        for p, t in zip(params, total, strict=True):
            p.grad = t * (0.3 / (length + 1e-6))
        optimizer.step()
    for known in found:
        torch.testing.assert_close(known["Lightning"], net.state_dict(), rtol=1e-6, atol=1e-6)


def test_gives_the_weights_back_after_an_error_and_goes_on(found):
    net, (x, y) = smooth(), batches(torch.float64)[0]
    F.mse_loss(net(x), y).backward()
    for known in found:
        assert known["errors"]["failed"] == "out of luck"
        assert known["errors"]["given back"]
        true = {n: p.grad for n, p in net.named_parameters()}
        torch.testing.assert_close(known["errors"]["grads"], true, rtol=1e-12, atol=1e-12)


def test_refuses_a_loss_without_gradients(found):
    for known in found:
        assert "the tensor has no graph" in known["errors"]["detached"]
        assert "set_requires_gradient_sync(True)" in known["errors"]["not synchronised"]


def test_goes_with_a_finite_difference_in_the_inputs(found):
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
    for known in found:
        torch.testing.assert_close(known["both"], true, rtol=1e-12, atol=1e-12)


def test_a_fit_is_refused_with_what_to_use(found):
    for known in found:
        weight, inputs = known["refused"]
        assert "double backprop needs the gathered weights twice" in weight
        assert "got scope='batch': use scope='global'" in weight
        assert "ModelParallelStrategy supports only penalties in the weights" in inputs


def test_says_what_cannot_be_and_what_to_use(found):
    said = found[0]["said"]
    ends = [
        "'exact' under FSDP: double backprop needs the gathered weights twice, and FSDP frees them "
        "after one backward; got exact(): use estimator='finite_difference', or DDP",
        "got projection(): use estimator='finite_difference', or DDP",
        "of='loss' is needed; got of='sampled_loss': use DDP",
        "averaged over the processes; got scope='sample': use scope='global', or DDP",
        "the weight gradient_share() measures gradients, which needs DDP",
    ]
    assert len(said["refused"]) == len(ends)
    for line, end in zip(said["refused"], ends, strict=True):
        assert line.endswith(end)
    assert said["taken"] == said["frozen"] == []
    (line,) = said["half"]
    assert "2.weight, 2.bias, 4.weight, 4.bias: apply fully_shard" in line
    assert said["is_sharded"] == [False, True]
