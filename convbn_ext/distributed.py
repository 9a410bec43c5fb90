"""Several processes: batch normalisation over the batches of all of them, and a solve whose batch is shared out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .fuse import rebuild
from .modules import plain_class
from .normalize import active_group
from .solve import SolveResult, solve
from .sync import SYNCED

if dist.is_available():
    # Imported later, as DistributedDataParallel does, its functions' defaults keep the process group of that time.
    # gloo's threads then outlive destroy_process_group, and one that gives back a tensor while the interpreter ends
    # aborts the process (https://github.com/pytorch/pytorch/issues/190489).
    import torch.distributed.nn.functional


def convert_sync(model: nn.Module, process_group: Any = None) -> nn.Module:
    """The model with training statistics over all processes, like ``nn.SyncBatchNorm.convert_sync_batchnorm``.

    Every nn.BatchNorm, in ConvBN layers and fused models too, becomes a subclass of it that works on any device, with
    one all-reduce in the forward pass and one in the backward pass. Parameters, buffers and ``state_dict`` keys stay;
    ``model`` itself is not changed. Gradients are those of the local loss, as DistributedDataParallel expects them.

    Args:
        model: plain, fused, or of ConvBN layers.
        process_group: of torch.distributed; None for all processes.

    Raises:
        ValueError: the model was fused with an example; convert it first.
    """

    def change(path: str, module: nn.Module) -> nn.Module:
        synced = SYNCED.get(plain_class(module))
        if synced is None:
            return module
        if hasattr(module, "_chain"):
            raise ValueError(f"convert_sync: {path} was fused with an example; call fuse after convert_sync")
        sync = object.__new__(synced)
        sync.__dict__.update(module.__dict__, process_group=process_group)
        return sync

    return rebuild(model, change)


def solve_sharded(conv: Any, bn: Any, x: Tensor, *, process_group: Any = None, **options: Any) -> SolveResult:
    """:func:`solve` with the samples shared out among processes; each gets the whole result.

    Args:
        conv: see :func:`solve`, as are bn and the options; the same in every process.
        bn: batch normalisation.
        x: (N, C_out, *out), the same in every process; rank r solves the r-th of nearly equal parts,
            which may be empty.
        process_group: of torch.distributed; None for all processes.
        options: of :func:`solve`, but no callback; stats must not be "batch".

    Returns:
        The result for all samples; method, preconditioner and reason are those of this process's part.

    Raises:
        ValueError: stats is "batch"; and what :func:`solve` raises, in every process.
    """
    if isinstance(options.get("stats"), str) and options["stats"] == "batch":
        raise ValueError(
            "solve_sharded: stats must be 'running' or (mean, var): a part of the batch has other statistics"
        )
    group = active_group(process_group)
    if group is None:
        return solve(conv, bn, x, **options)
    parts = torch.arange(len(x), device="cpu").tensor_split(dist.get_world_size(group))
    mine = parts[dist.get_rank(group)]
    count = len(mine)
    some = mine if count else parts[0][:1]  # without a part of its own: for method and shape of z alone
    if options.get("x0") is not None:
        options["x0"] = options["x0"][some]
    result = solve(conv, bn, x[some], **options)
    z = result.z.new_empty(len(x), *result.z.shape[1:])
    z[mine] = result.z[:count]
    for rank, part in enumerate(parts):
        if len(part):
            dist.broadcast(z[part[0] : part[-1] + 1], dist.get_global_rank(group, rank), group=group)
    others: list[Any] = [None] * len(parts)
    found = (result.status[:count], result.iterations[:count], result.residual[:count], [*result.history][:count])
    dist.all_gather_object(others, found, group=group)
    status, iterations, residual, history = zip(*others, strict=True)
    return replace(
        result,
        z=z,
        status=[s for part in status for s in part],
        iterations=torch.cat(iterations),
        residual=torch.cat(residual),
        history=[h for part in history for h in part],
    )
