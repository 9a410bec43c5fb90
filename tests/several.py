"""Run a function in several processes that talk over gloo, and collect what each returns."""

from __future__ import annotations

import datetime
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank, world, function, arguments, store, results):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    torch.save(function(rank, *arguments), f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(world, function, *arguments):
    """What ``function(rank, *arguments)`` returns in each of ``world`` processes; it must be importable."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world, function, arguments, f"{folder}/store", folder), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]
