"""GANModule on two processes equals one process on the joint batch, under every DDP strategy."""

import pytest
import ranks
import torch
from gan_by_hand import gp_term, interpolates, lazy_term, train
from gans import B, Witness, data, module, trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Subset

import gpkit

pytestmark = pytest.mark.ddp

N = 32  # samples of an epoch
STRATEGIES = {
    "ddp": {},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
}
CASES = {  # strategy, penalty, the same by hand, options of both
    **{name: (name, gpkit.wgan_gp(5.0), gp_term, {}) for name in STRATEGIES},
    # R1 reaches no last bias, and its lazy steps have no other loss.
    "penalty steps": ("ddp", gpkit.r1(3.0, every=2), lazy_term, {"apart": True}),
    "accumulate": ("ddp", gpkit.wgan_gp(5.0), gp_term, {"accumulate": 2}),
    "simultaneous": ("ddp", gpkit.wgan_gp(5.0), gp_term, {"simultaneous": True}),
}


def nets():
    """Nets with a parameter that nothing reaches."""
    torch.manual_seed(0)
    G = Witness(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    C = Witness(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    for net in (G, C):
        net.unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
    return G, C


def made(penalty=None, apart=False, **options):
    given = {"loss": "non_saturating", "ema": 0.5, "seed": 7, "penalty_steps": apart}
    return module(*nets(), penalty=penalty, **given, **options)


def part(rank):
    """Return the batches of a process: every second sample."""
    return DataLoader(Subset(data(N), range(rank, N, ranks.RANKS)), B)


def of_rank(rank):
    """Train every case; return what this process knows at its end."""
    known = {}
    for name, (strategy, penalty, _, options) in CASES.items():
        gan = made(penalty, **options)
        runner = trainer(
            max_epochs=1,
            devices=ranks.RANKS,
            strategy=DDPStrategy(**STRATEGIES[strategy], process_group_backend="gloo"),
            use_distributed_sampler=False,
        )
        runner.fit(gan, part(rank))
        state = {k: v.clone() for k, v in gan.state_dict().items()}
        known[name] = state, gan.generator.seen, gan.critic.seen
    try:
        strategy = DDPStrategy(static_graph=True, process_group_backend="gloo")
        trainer(devices=ranks.RANKS, strategy=strategy).fit(made(), part(rank))
    except RuntimeError as error:
        known["static_graph"] = str(error)
    return known


@pytest.fixture(scope="module")
def found():
    return ranks.run(of_rank)


def together(seen):
    """Return what both processes saw, batch by batch."""
    return [torch.cat(batches) for batches in zip(*seen, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_on_the_joint_batch(case, found):
    *_, term, options = CASES[case]
    latents = together([known[case][1] for known in found])
    scored = together([known[case][2] for known in found])
    points = interpolates(scored, data(N).tensors[0]) if term is gp_term else []
    shares = zip(*map(part, range(ranks.RANKS)), strict=True)
    joint = [(torch.cat([x for x, _ in batches]), None) for batches in shares]
    nets_by_hand = train(*nets(), [joint], (latents, points), term, ema=0.5, **options)
    names = "generator.", "critic.", "ema_generator."
    pairs = zip(names, nets_by_hand, strict=True)
    true = {name + k: v for name, net in pairs for k, v in net.state_dict().items()}
    for known in found:
        torch.testing.assert_close(known[case][0], true, rtol=1e-9, atol=1e-12)
    start = made().state_dict()
    moved = [k for k, v in true.items() if not torch.equal(v, start[k])]
    assert not any("unused" in k for k in moved)
    assert len(moved) == 12


def test_each_process_draws_latents_and_interpolates_of_its_own(found):
    latents = torch.cat([z for known in found for z in known["ddp"][1]])
    assert len(latents.unique(dim=0)) == len(latents)


def test_a_static_graph_is_refused(found):
    for known in found:
        assert "leave static_graph out" in known["static_graph"]
