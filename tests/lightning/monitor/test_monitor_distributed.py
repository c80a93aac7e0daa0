"""The monitor on two processes: norms of averaged gradients, means over all samples."""

import copy
from functools import partial

import nets
import pytest
import pytorch_lightning as pl
import ranks
import torch
import torch.nn.functional as F
from modules import Plain
from monitored import ALL, OPTIONS, B, Validated, approx, data, norms_of_samples, size
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import gpkit

pytestmark = pytest.mark.ddp

STRATEGIES = {
    "ddp": DDPStrategy,
    "static_graph": partial(DDPStrategy, static_graph=True),
    "sharded": partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1),
    "unmonitored": DDPStrategy,
}


def distributed(rank):
    """Train on every second sample with each strategy; return what was logged, and the weights."""
    x, y = data().tensors
    mine = DataLoader(TensorDataset(x[rank::2], y[rank::2]), B)
    ends = {}
    for name in STRATEGIES:
        net = nets.net()
        sharded = name == "sharded"
        module = Sharded(net) if sharded else Validated(net)
        monitor = gpkit.GradientNormMonitor("layer", **({} if sharded else ALL))
        trainer = on_two(name, *[monitor] * (name != "unmonitored"))
        trainer.fit(module, mine, mine)
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        ends[name] = logged, [whole(p).detach() for p in net.parameters()]
    trainer = on_two("sharded", gpkit.GradientNormMonitor(inputs="net"))
    with pytest.raises(ValueError, match="gathers parameters for one backward pass a step"):
        trainer.fit(Sharded(nets.net(torch.float32)), mine)
    return ends


def on_two(name, *monitors):
    options = {"devices": 2, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    options |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    strategy = STRATEGIES[name]()
    return pl.Trainer(
        logger=False, strategy=strategy, callbacks=list(monitors), **OPTIONS, **options
    )


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Sharded(Plain):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.fixture(scope="module")
def on_ranks():
    return ranks.run(distributed)


def halves():
    """The first batch of each rank."""
    x, y = data().tensors
    return [(x[rank::2][:B], y[rank::2][:B]) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "static_graph", "sharded"])
def test_of_the_gradient_averaged_over_processes(net, on_ranks, strategy):
    sum(F.cross_entropy(net(x), y) / 2 for x, y in halves()).backward()
    for known in on_ranks:
        logged, _ = known[strategy]
        assert logged["grad_norm/weight"] == approx(size(*net.parameters()))
        assert logged["grad_norm/weight/net.head"] == approx(size(*net.head.parameters()))


@pytest.mark.parametrize("strategy", ["ddp", "static_graph"])
def test_means_over_the_samples_of_all_processes(net, on_ranks, strategy):
    trained = copy.deepcopy(net)
    with torch.no_grad():
        for p, end in zip(trained.parameters(), on_ranks[0][strategy][1], strict=True):
            p.copy_(end)
    for prefix, at in [("grad_norm", net), ("val/grad_norm", trained)]:
        for name, where in [("input", "input"), ("activation/net.backbone", "activation")]:
            slopes = [norms_of_samples(at, x, y, where).mean() for x, y in halves()]
            for known in on_ranks:
                value = known[strategy][0][f"{prefix}/{name}"]
                assert value == approx(torch.stack(slopes).mean().item())
    lengths = []
    for x, y in halves():  # at validation every batch has a gradient of its own
        trained.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        lengths.append(size(*trained.parameters()))
    assert on_ranks[0][strategy][0]["val/grad_norm/weight"] == approx(sum(lengths) / 2)


@pytest.mark.parametrize("strategy", ["ddp", "static_graph"])
def test_processes_train_as_without(on_ranks, strategy):
    for known in on_ranks:
        for a, b in zip(known[strategy][1], known["unmonitored"][1], strict=True):
            assert torch.equal(a, b)
