"""Data-parallel training with batch statistics of all processes.

torchrun --nproc-per-node 2 examples/ddp.py [--steps 30]

Every process holds its own part of the digits; convert_sync makes the statistics, DistributedDataParallel the gradients
those of the whole batch, so the losses are those of one process with all of it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits_classifier import digits, network
from torch.nn.parallel import DistributedDataParallel

import convbn_ext as cb


def main() -> None:
    """Train on this process's share of every batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)  # the same start everywhere
    images, labels = digits()
    model = DistributedDataParallel(cb.fuse(cb.convert_sync(network())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step, batch in enumerate(torch.randperm(len(images)).split(128)[:-1] * arguments.steps):
        if step == arguments.steps:
            break
        mine = batch.chunk(world)[rank]
        loss = F.cross_entropy(model(images[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shared = loss.detach() / world
        dist.all_reduce(shared)
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {shared.item():.4f}", flush=True)
    statistics = model.module[1].running_var.clone()
    dist.broadcast(statistics, 0)
    same = torch.equal(statistics, model.module[1].running_var)
    print(f"process {rank} of {world}: the same statistics as process 0: {same}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
