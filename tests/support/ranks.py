"""Two processes that run functions of the tests with gloo between them."""

import datetime
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(function, folder, *args, ranks=2):
    """Return what ``function(rank, *args)`` returned on each rank."""
    mp.spawn(_work, (ranks, free_port(), folder, function, args), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _work(rank, ranks, port, folder, function, args):
    # As torchrun starts a process: Lightning then takes the processes as they are.
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    try:
        torch.save(function(rank, *args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
