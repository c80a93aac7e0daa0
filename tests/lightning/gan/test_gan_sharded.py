"""GANModule with FSDP2: two processes equal one process on the joint batch, trained by hand."""

import pytest
import ranks
import torch
from gan_by_hand import gp_term, interpolates, lazy_term, no_term, r1_r2_term, train
from gans import data, module, trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import gpkit
from tests.lightning.gan.test_gan_distributed import N, nets, part, together

pytestmark = pytest.mark.ddp


class Sharded(gpkit.GANModule):
    """Shards each layer of some of its nets, and these nets."""

    shards = "generator", "critic"

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for name in self.shards:
            net = getattr(self, name)
            if hasattr(net, "reshard"):
                continue  # Lightning calls this more than once
            for layer in (m for m in net.layers if list(m.parameters())):
                fully_shard(layer, mesh=mesh)
            fully_shard(net, mesh=mesh)


class CriticAlone(Sharded):
    shards = ("critic",)


class Looks(Sharded):
    """One group for each net, which a look leaves gathered between a backward pass and a step."""

    def configure_model(self):
        for net in (self.generator, self.critic):
            if not hasattr(net, "reshard"):
                fully_shard(net, mesh=self.device_mesh["data_parallel"])

    def manual_backward(self, loss):
        super().manual_backward(loss)
        with torch.no_grad():
            for net, inputs in ((self.generator, 3), (self.critic, 2)):
                net.eval()  # or it would note what it is given
                net(torch.ones(1, inputs, dtype=torch.float64))
                net.train()


R1_R2 = {"r1": gpkit.r1(3.0), "r2": gpkit.r2(1.0)}
CASES = {  # penalty, the same by hand, options of both
    "WGAN-GP": (gpkit.wgan_gp(5.0), gp_term, {}),
    "R1 + R2": (R1_R2, r1_r2_term, {"critic_steps": 1}),
    "penalty steps": (gpkit.r1(3.0, every=2), lazy_term, {"apart": True}),
    "accumulate": (gpkit.wgan_gp(5.0), gp_term, {"accumulate": 2}),
    "simultaneous": (R1_R2, r1_r2_term, {"simultaneous": True}),
    "clipped": (None, no_term, {"clip": 0.3, "gradient_clip": 0.5}),
    "relativistic": (R1_R2, r1_r2_term, {"loss": "relativistic"}),
}


def fitted(rank, kind, penalty, apart=False, steps=1000, **options):
    """Train; return the whole weights, and what the nets and the log have."""
    given = {"loss": "non_saturating", "ema": 0.5, "seed": 7, "penalty_steps": apart}
    made = module(*nets(), penalty=penalty, **{**given, **options})
    made.__class__ = kind
    runner = trainer(
        max_epochs=1,
        devices=ranks.RANKS,
        strategy=ModelParallelStrategy(data_parallel_size=ranks.RANKS, tensor_parallel_size=1),
        use_distributed_sampler=False,
        log_every_n_steps=steps,
    )
    runner.fit(made, part(rank), part(rank) if steps == 1 else None)
    whole = {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for n, p in made.state_dict().items()
    }
    logged = {k: float(v) for k, v in runner.callback_metrics.items()}
    return whole, made.generator.seen, made.critic.seen, logged


def of_rank(rank):
    found = {}
    for name, (penalty, _, options) in CASES.items():
        found[name] = fitted(rank, Sharded, penalty, **options)
    found["critic alone"] = fitted(rank, CriticAlone, R1_R2)
    found["looked at"] = fitted(rank, Looks, R1_R2)
    found["logged"] = fitted(rank, Sharded, gpkit.r1(3.0), steps=1, generator_first=True)
    said = {}
    for name, penalty in {
        "weights": gpkit.weight_grad_norm(0.1),
        "share": gpkit.r1(gpkit.gradient_share(0.1)),
    }.items():
        try:
            fitted(rank, Sharded, penalty)
        except RuntimeError as error:
            said[name] = str(error)
    return found, said


@pytest.fixture(scope="module")
def found():
    return ranks.run(of_rank)


@pytest.mark.parametrize("case", [*CASES, "critic alone", "looked at"])
def test_two_processes_are_one_on_the_joint_batch(case, found, record_property):
    _, term, options = CASES.get(case, (R1_R2, r1_r2_term, {}))
    latents = together([known[case][1] for known, _ in found])
    scored = together([known[case][2] for known, _ in found])
    points = interpolates(scored, data(N).tensors[0]) if term is gp_term else []
    shares = zip(*map(part, range(ranks.RANKS)), strict=True)
    joint = [(torch.cat([x for x, _ in batches]), None) for batches in shares]
    by_hand = train(*nets(), [joint], (latents, points), term, **{"ema": 0.5, **options})
    names = "generator.", "critic.", "ema_generator."
    pairs = zip(names, by_hand, strict=True)
    true = {name + k: v for name, net in pairs for k, v in net.state_dict().items()}
    worst = 0.0
    for known, _ in found:
        torch.testing.assert_close(known[case][0], true, rtol=1e-9, atol=1e-12)
        worst = max(worst, *((known[case][0][k] - v).abs().max().item() for k, v in true.items()))
    record_property("sharded", (f"GANModule, {case}", worst))
    start = module(*nets(), ema=0.5).state_dict()
    moved = [k for k, v in true.items() if not torch.equal(v, start[k])]
    # Pairs cancel the last bias; a bound moves what nothing else does.
    assert len(moved) == {"relativistic": 11, "clipped": 13}.get(case, 12)


def test_slopes_and_losses_are_logged(found):
    for known, _ in found:
        logged = known["logged"][-1]
        assert {"val/critic_loss", "penalty/r1/norm", "slope/real", "train/critic_loss"} <= set(
            logged
        )
        assert logged["slope/real"] == pytest.approx(logged["penalty/r1/norm"], rel=0.5)


def test_what_needs_whole_weights_is_refused(found):
    for _, said in found:
        assert "a penalty in the weights needs whole weights" in said["weights"]
        assert "gradient_share() needs whole weights" in said["share"]
