"""GANModule on two processes equals one process on the joint batch, under every DDP strategy."""

import copy
import os
import socket
import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, Subset, TensorDataset

import gpkit
from gpkit.lightning.gan import GANModule

B, N, RANKS = 3, 24, 2  # samples of a batch on each process, and of an epoch
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.5)


class Witness(nn.Module):
    """Layers that keep a record of what they are given, and a parameter that nothing reaches."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers).double()
        self.unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.layers(x)


def nets():
    torch.manual_seed(0)
    G = Witness(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    C = Witness(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    return G, C


def data():
    rng = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(N, 2, generator=rng, dtype=torch.float64))


def part(rank):
    """Return the batches of a process: every second sample."""
    return DataLoader(Subset(data(), range(rank, N, RANKS)), B)


STRATEGIES = {
    "ddp": {},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
}
CASES = {  # strategy, options of the module
    **{name: (name, {"penalty": gpkit.wgan_gp(5.0)}) for name in STRATEGIES},
    # R1 reaches no last bias, and its lazy steps have no other loss.
    "penalty steps": ("ddp", {"penalty": gpkit.r1(3.0, every=2), "penalty_steps": True}),
    "accumulate": ("ddp", {"penalty": gpkit.wgan_gp(5.0), "accumulate": 2}),
    "simultaneous": ("ddp", {"penalty": gpkit.wgan_gp(5.0), "simultaneous": True}),
}


def module(options):
    G, C = nets()
    given = {"critic_optimizer": SGD, "generator_optimizer": SGD, "critic_steps": 2, "ema": 0.5}
    given |= {"latent_dim": 3, "loss": "non_saturating", "seed": 7}
    return GANModule(G, C, **given, **copy.deepcopy(options))


def trainer(**options):
    quiet = ["enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"]
    options = {**dict.fromkeys(quiet, False), "max_epochs": 1, **options}
    return pl.Trainer(accelerator="cpu", log_every_n_steps=1000, **options)


def work(rank, port, folder):
    """Train every case, as the launcher of a cluster would have started this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "TORCHELASTIC_RUN_ID": "test"}
    known = {}
    for name, (strategy, options) in CASES.items():
        made = module(options)
        runner = trainer(
            devices=RANKS,
            strategy=DDPStrategy(**STRATEGIES[strategy], process_group_backend="gloo"),
            use_distributed_sampler=False,
        )
        runner.fit(made, part(rank))
        state = {k: v.clone() for k, v in made.state_dict().items()}
        known[name] = state, made.generator.seen, made.critic.seen
    try:
        strategy = DDPStrategy(static_graph=True, process_group_backend="gloo")
        trainer(devices=RANKS, strategy=strategy).fit(module({}), part(rank))
    except RuntimeError as error:
        known["static_graph"] = str(error)
    torch.save(known, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what each process knows at its end."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def by_hand(latents, points, penalty=None, penalty_steps=False, accumulate=1, simultaneous=False):
    """Train on joint batches in one process, with torch.autograd only."""
    G, C = nets()
    average = copy.deepcopy(G)
    oC, oG = SGD(C.parameters()), SGD(G.parameters())
    latents, points = iter(latents), iter(points)
    joint = [
        torch.cat([x for (x,) in halves]) for halves in zip(*map(part, range(RANKS)), strict=True)
    ]

    def term(real):
        if penalty.name == "wgan_gp":
            point = next(points).requires_grad_()
            (g,) = torch.autograd.grad(C(point).sum(), point, create_graph=True)
            return 5.0 * (g.norm(dim=1) - 1).square().mean()
        real = real.clone().requires_grad_()
        (g,) = torch.autograd.grad(C(real).sum(), real, create_graph=True)
        return 2 * 3.0 / 2 * g.square().sum(1).mean()

    for step, i in enumerate(range(0, len(joint), accumulate), 1):
        window = joint[i : i + accumulate]
        oC.zero_grad()
        for real in window:
            fake = G(next(latents)).detach()
            total = softplus(C(fake)).mean() + softplus(-C(real)).mean()
            total = total + (0 if penalty_steps else term(real))
            (total / len(window)).backward()
        turn = step % 2 == 0

        def generator_gradient(window=window):
            oG.zero_grad()
            for _ in window:
                total = softplus(-C(G(next(latents)))).mean() / len(window)
                params = list(G.layers.parameters())
                for p, g in zip(params, torch.autograd.grad(total, params), strict=True):
                    p.grad = g if p.grad is None else p.grad + g

        if turn and simultaneous:
            generator_gradient()
        oC.step()
        if penalty_steps and (step - 1) % 2 == 0:
            oC.zero_grad()
            for real in window:
                next(latents)
                (term(real) / len(window)).backward()
            oC.step()
        if turn:
            if not simultaneous:
                generator_gradient()
            oG.step()
            for a, p in zip(average.parameters(), G.parameters(), strict=True):
                a.data = (a.data + p.data) / 2
    prefixes = {"generator.": G, "critic.": C, "ema_generator.": average}
    return {p + k: v for p, net in prefixes.items() for k, v in net.state_dict().items()}


def together(seen):
    """Return what both processes saw, batch by batch."""
    return [torch.cat(batches) for batches in zip(*seen, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_on_the_joint_batch(case, ranks):
    _, options = CASES[case]
    latents = together([known[case][1] for known in ranks])
    real = {tuple(row) for row in data().tensors[0].tolist()}
    scored = together([known[case][2] for known in ranks])
    after = zip(scored, scored[2:], strict=False)
    points = [point for first, point in after if tuple(first[0].tolist()) in real]
    true = by_hand(latents, points, **options)
    for known in ranks:
        torch.testing.assert_close(known[case][0], true, rtol=1e-9, atol=1e-12)
    start = module({}).state_dict()
    moved = [k for k, v in true.items() if not torch.equal(v, start[k])]
    assert not any("unused" in k for k in moved)
    assert len(moved) == 12


def test_each_process_draws_latents_and_interpolates_of_its_own(ranks):
    latents = torch.cat([z for known in ranks for z in known["ddp"][1]])
    assert len(latents.unique(dim=0)) == len(latents)


def test_a_static_graph_is_refused(ranks):
    for known in ranks:
        assert "leave static_graph out" in known["static_graph"]
