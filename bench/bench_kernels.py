"""What a GPU does during a training step of conv → BN → ReLU, kernel by kernel: ours against eager.

    python bench/bench_kernels.py [--dtype bfloat16] [--layout channels_last] [--out out/bench]

Kernel times are the profiler's, so neither launches nor gaps count: what is left where the host keeps ahead of the
GPU, as in a large network or a CUDA graph. "step" is wall-clock time. Ours once around torch's convolution and, in
channels_last, once with our own (CONVBN_EXT_ALGORITHM). Writes kernels.csv into --out; ends with geometric means.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_conv_bn import DTYPES, LAYOUTS, SHAPES, UNSEEN, name_of
from harness import environment, geometric_mean, interleave, write_csv
from torch import nn
from torch.profiler import ProfilerActivity, profile

import convbn_ext as cb

ROUNDS = 8


def kernels(step: Callable[[], object]) -> list[tuple[str, float, float]]:
    """(name, launches, microseconds) of a step."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        for _ in range(ROUNDS):
            step()
        torch.cuda.synchronize()
    events = (e for e in recorded.key_averages() if e.self_device_time_total > 0)
    return [(e.key, e.count / ROUNDS, e.self_device_time_total / ROUNDS) for e in events]


def steps(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Iterator[tuple[str, Callable]]:
    n, c_in, c_out, k, h, stride, groups = shape
    conv = nn.Conv2d(c_in, c_out, k, stride=stride, padding=k // 2, groups=groups, bias=False)
    conv, bn = conv.to("cuda", dtype, memory_format=layout), nn.BatchNorm2d(c_out).to("cuda", dtype)
    x = torch.randn(n, c_in, h, h, device="cuda").to(dtype).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn_like(conv(x))
    eager, ours = nn.Sequential(conv, bn, nn.ReLU()), cb.ConvBN2d.from_modules(conv, bn, "relu")

    def step(module: nn.Module, algorithm: str) -> Callable[[], None]:
        def run() -> None:
            os.environ["CONVBN_EXT_ALGORITHM"] = algorithm
            module(x).backward(grad)
            x.grad = None
            module.zero_grad()

        return run

    yield "eager", step(eager, "auto")
    yield "ours", step(ours, "aten")
    if layout == torch.channels_last:
        yield "ours, own convolution", step(ours, "implicit_gemm")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--layout", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(f"no GPU here that torch {torch.__version__} can use\n")
    torch.set_default_device("cuda")  # of the clock
    rows, means = [], []
    for dtype, layout in itertools.product(args.dtype, args.layout):
        ratios: dict[str, list[float]] = {}
        formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
        for shape in SHAPES + UNSEEN:
            torch.manual_seed(0)
            runs = dict(steps(shape, getattr(torch, dtype), formats[layout]))
            wall, busy = interleave(runs, seconds=0.05), {}
            for provider, step in runs.items():
                found = kernels(step)
                busy[provider] = sum(us for *_, us in found)
                about = {"shape": name_of(shape), "dtype": dtype, "layout": layout, "provider": provider}
                rows += [{**about, "kernel": name, "launches": count, "us": us} for name, count, us in found]
                ratios.setdefault(provider, []).append(busy["eager"] / busy[provider])
            print(f"{dtype}, {layout}, {name_of(shape)}: us of kernels (of a step)", end="")
            print("".join(f", {p} {busy[p]:.0f} ({1e3 * wall[p]['p50']:.0f})" for p in runs), flush=True)
        means += [
            f"{dtype}, {layout}, {p}: x{geometric_mean(r):.2f} eager in kernel time, least x{min(r):.2f}"
            for p, r in ratios.items()
            if p != "eager"
        ]
    torch.set_default_device("cpu")
    write_csv(
        args.out / "kernels.csv", [{**row, **environment(), "device": torch.cuda.get_device_name()} for row in rows]
    )
    print("\n".join(means))


if __name__ == "__main__":
    main()
