"""Two processes with gloo between them, that run functions of the tests.

They are started once, by the first test that needs them: most of what a pair costs is its imports.
"""

import atexit
import datetime
import os
import pickle
import random
import socket
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS, TIMEOUT = 2, 300  # seconds for a function
_pair = []  # a process and our end of its pipe, for each rank


def run(function, *args):
    """Return what ``function(rank, *args)`` returned on each rank, copied as pickle copies."""
    if not _pair:
        start()
    call = pickle.dumps((function, args, free_port()))
    for _, pipe in _pair:
        pipe.send_bytes(call)
    results, errors = [], []
    for rank, (_, pipe) in enumerate(_pair):
        answered = pipe.poll(5 if errors else TIMEOUT)
        error, result = "it does not answer", None
        if answered:
            error, result = pickle.loads(pipe.recv_bytes())
        results.append(result)
        errors += [f"on rank {rank}: {error}"] if error else []
    if errors:
        stop()  # the other rank may wait for this one
        raise RuntimeError("\n".join(errors))
    return results


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start():
    context = mp.get_context("spawn")
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(rank, theirs), daemon=True)
        process.start()
        _pair.append((process, ours))


@atexit.register
def stop():
    for process, _ in _pair:
        process.kill()  # at its own exit gloo's threads would abort it now and then
        process.join()
    _pair.clear()


def _work(rank, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        call = pipe.recv_bytes()
        try:
            answer = None, _called(rank, *pickle.loads(call))
        except Exception:
            answer = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(answer))


def _called(rank, function, args, port):
    # As torchrun starts a process: Lightning then takes the processes as they are.
    before = dict(os.environ)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    torch.manual_seed(0)
    random.seed(0)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    try:
        result = function(rank, *args)
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ |= before
