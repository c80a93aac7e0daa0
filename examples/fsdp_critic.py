"""A critic that FSDP2 shards over two processes, with R1 and R2, and the same in one process.

`fully_shard` leaves each process a part of the weights. The penalties need nothing more: gpkit
gathers the weights where the backward pass comes to the derivative.

    torchrun --nproc-per-node 2 examples/fsdp_critic.py        # about 6 seconds

It prints the share of the weights that one process holds (about 0.5), and the largest difference
of any weight from one process after 20 steps (below 1e-12, in float64).
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import softplus

import gpkit

B, STEPS = 16, 20
torch.set_num_threads(1)


def critic():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64)) for _ in range(3)]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 1)).double()


def train(net, rank, ranks):
    """Train on this process's share of each batch."""
    rng = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    penalty = gpkit.r1_r2(weight=1.0)
    for _ in range(STEPS):
        images = torch.randn(2, B, 1, 8, 8, generator=rng, dtype=torch.float64)
        real, fake = images[:, rank::ranks] * torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1, 1)
        loss = softplus(-net(real)).mean() + softplus(net(fake)).mean()
        optimizer.zero_grad()
        (loss + penalty(net, real=real, fake=fake)).backward()
        optimizer.step()
    return net


dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
sharded = critic()
mesh = init_device_mesh("cpu", (ranks,))
for part in (*sharded[1:4], sharded):
    fully_shard(part, mesh=mesh)
train(sharded, rank, ranks)

held = sum(p.to_local().numel() for p in sharded.parameters())
weights = [p.full_tensor() for p in sharded.parameters()]
if rank == 0:
    one = train(critic(), 0, 1)  # on the whole batch, with no other process
    pairs = zip(weights, one.parameters(), strict=True)
    print(f"share of the weights {held / sum(p.numel() for p in one.parameters()):.2f}")
    print(f"largest difference {max((a - b).abs().max().item() for a, b in pairs):.1e}")
dist.barrier()  # leave together
dist.destroy_process_group()
