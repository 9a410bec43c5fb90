"""A layer too large for a factor, solved to 1e-4 within 2 GB: every padding, two kinds of kernel.

    python bench/bench_large.py [--padding zeros …] [--family default …] [--shape 64x56x56] [--batch 4] [--out DIR]

Every case runs in a process of its own. Its peak memory is the process's: interpreter, torch, the layer and the solve.
"true residual" is BN(Conv(z)) − x by torch's own modules in float64. Writes large.csv into --out.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import environment, write_csv
from torch import nn

import convbn_ext as cb
from convbn_ext.experiment_report import peak_memory

PADDINGS = ("zeros", "circular", "reflect", "replicate")
FAMILIES = ("default", "identity + noise")
RTOL, LIMIT = 1e-4, 2e9  # relative residual; bytes


def measure(shape: tuple[int, ...], batch: int, padding: str, family: str) -> dict[str, Any]:
    """Solve one layer in this process."""
    torch.manual_seed(0)
    conv = nn.Conv2d(shape[0], shape[0], 3, padding=1, padding_mode=padding)  # type: ignore[arg-type]
    bn = nn.BatchNorm2d(shape[0], momentum=None)
    with torch.no_grad():
        if family != "default":
            nn.init.dirac_(conv.weight).add_(0.1 * torch.randn_like(conv.weight))
        z = torch.rand(batch, *shape)
        bn(conv(z))
        x = bn.eval()(conv(z))
    start = time.perf_counter()
    result = cb.solve(conv, bn, x, rtol=RTOL)
    seconds, memory = time.perf_counter() - start, peak_memory()
    with torch.no_grad():
        rest = (bn.double()(conv.double()(result.z.double())) - x).flatten(1).norm(dim=1)
    residual = float((rest / x.double().flatten(1).norm(dim=1)).max())
    return {
        "shape": "x".join(map(str, shape)),
        "batch": batch,
        "padding": padding,
        "family": family,
        "status": next((s for s in result.status if s != "converged"), "converged"),
        "residual": residual,
        "iterations": int(result.iterations.max()),
        "seconds": seconds,
        "peak_bytes": memory,
        "met": residual <= RTOL and memory <= LIMIT,
        "reason": result.reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="64x56x56")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--padding", nargs="+", default=PADDINGS, choices=PADDINGS)
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    shape = tuple(int(s) for s in args.shape.split("x"))
    rows = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for family in args.family:
            for padding in args.padding:
                row = pool.submit(measure, shape, args.batch, padding, family).result()
                rows.append(row)
                print(
                    f"large, {row['shape']} x {row['batch']}, {family}, {padding}: {row['status']}, true residual "
                    f"{row['residual']:.1e}, {row['iterations']} iterations, {row['seconds']:.1f} s, peak memory "
                    f"{row['peak_bytes'] / 2**30:.2f} GiB{'' if row['met'] else ' MISSED'}; {row['reason']}",
                    flush=True,
                )
    env = environment()
    write_csv(args.out / "large.csv", [{**row, **env} for row in rows])
    print(", ".join(f"{k} {v}" for k, v in env.items()))


if __name__ == "__main__":
    main()
