"""Would it pay on a CPU to normalise and activate inside the next convolution's load?

    python bench/bench_chain.py

y₂ = w ⋆ act(BN(y₁)), channels_last, two ways: the activated tensor is written whole and convolved, as the operators do;
or a few samples at a time are activated into a buffer that stays in the cache and convolved from there, which saves a
write and a read of a full tensor. Prints medians in ms and the geometric mean of whole over the best chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench_conv_bn import SHAPES, name_of
from harness import environment, geometric_mean, interleave

import convbn_ext as cb  # noqa: F401  registers the operators

CHUNKS = [1, 2, 4, 8, 16]


@torch.no_grad()
def measure(shape, dtype) -> dict[str, float]:
    """Median ms per way."""
    n, c_in, c_out, k, h, stride, groups = shape
    like = {"memory_format": torch.channels_last}
    y1 = torch.randn(n, c_in, h, h).to(dtype).contiguous(**like)
    weight = torch.randn(c_out, c_in // groups, k, k).mul(0.05).to(dtype).contiguous(**like)
    mean, scale, bias = torch.zeros(c_in).double(), torch.ones(c_in).double(), torch.zeros(c_in).double()

    def load(y):
        return torch.ops.convbn_ext.bn_apply(y, mean, scale, bias, None, "relu", 0.0)

    def convolve(x):
        return F.conv2d(x, weight, None, stride, k // 2, 1, groups)

    y2 = torch.empty_like(convolve(y1))

    def chunked(size):
        def run():
            for i in range(0, n, size):
                y2[i : i + size].copy_(convolve(load(y1[i : i + size])))

        return run

    ways = {"whole": lambda: convolve(load(y1)), "convolution alone": lambda: convolve(y1)}
    ways |= {f"chunks of {size}": chunked(size) for size in CHUNKS if size < n}
    return {way: m["p50"] for way, m in interleave(ways, seconds=1.2).items()}


def main() -> None:
    """All of bench_conv_bn's shapes but the one with three channels, which is a network's first layer."""
    print(environment())
    for dtype in (torch.float32, torch.bfloat16):
        ratios = []
        for shape in SHAPES:
            if shape[1] == 3:
                continue
            ms = measure(shape, dtype)
            print(f"{dtype}, {name_of(shape)}: " + ", ".join(f"{way} {t:.2f}" for way, t in ms.items()), flush=True)
            ratios.append(ms["whole"] / min(t for way, t in ms.items() if way.startswith("chunks")))
        print(
            f"{dtype}: whole / best chunk x{geometric_mean(ratios):.2f}, from x{min(ratios):.2f} to x{max(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
