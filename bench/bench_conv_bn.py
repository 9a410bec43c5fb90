"""conv → BN → ReLU: ours against eager torch, torch.compile, the folded layer, and the convolution alone.

    python bench/bench_conv_bn.py [--quick] [--compile] [--dtype float32] [--layout channels_last] [--mode eval]

With --device cuda eager is torch's cuDNN path, timed by events with a cold L2 cache. The column "vs_copy" is the time
over that of moving the full-tensor passes (3 forward, 8 with backward, 2 in eval) at the bandwidth of a copy.

Results are compared with eager's first. Writes conv_bn.csv and conv_bn.png into --out; ends with the time of every
provider over ours, geometric means and the smallest ratio, over the twelve shapes and over the four that nothing was
tuned to. "peak_MB" is what a call holds at most beside what was there before it.

Much of eager's time on large tensors is fresh memory (page faults), which ours avoid. To see what is left without that:

    GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456 \
        python bench/bench_conv_bn.py        # a malloc that keeps its memory, for everybody
    CONVBN_EXT_POOL=0 python bench/bench_conv_bn.py     # fresh memory for us too
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import (
    add_device_argument,
    copy_bandwidth,
    environment,
    geometric_mean,
    interleave,
    peak_bytes,
    write_csv,
)
from torch import nn

import convbn_ext as cb

# (N, C_in, C_out, kernel, H, stride, groups)
SHAPES = [
    (32, 64, 64, 3, 56, 1, 1),
    (32, 64, 256, 1, 56, 1, 1),
    (32, 256, 64, 1, 56, 1, 1),
    (32, 128, 128, 3, 28, 1, 1),
    (32, 512, 128, 1, 28, 1, 1),
    (32, 256, 256, 3, 14, 1, 1),
    (32, 1024, 256, 1, 14, 1, 1),
    (32, 512, 512, 3, 7, 1, 1),
    (64, 3, 64, 3, 32, 1, 1),
    (64, 16, 16, 3, 32, 1, 1),
    (64, 32, 32, 3, 56, 1, 32),
    (16, 64, 64, 3, 56, 2, 1),
]
# nothing was tuned to these
UNSEEN = [(24, 48, 96, 3, 40, 1, 1), (20, 96, 40, 1, 36, 1, 1), (40, 24, 24, 5, 30, 1, 24), (12, 80, 80, 3, 33, 2, 1)]
DTYPES = ["float32", "bfloat16"]
LAYOUTS = ["channels_last", "contiguous"]
MODES = ["forward", "forward+backward", "eval"]


PASSES = {"forward": 3, "forward+backward": 8, "eval": 2}


def pass_bytes(shape, dtype) -> int:
    """Bytes of the layer's output: what one full-tensor pass moves."""
    n, _, c_out, k, h, stride, _ = shape
    return n * c_out * ((h + k // 2 * 2 - k) // stride + 1) ** 2 * dtype.itemsize


def name_of(shape) -> str:
    n, c_in, c_out, k, h, stride, groups = shape
    extra = (f" stride {stride}" if stride > 1 else "") + (f" groups {groups}" if groups > 1 else "")
    return f"{n}x{c_in}x{h}x{h} to {c_out} k{k}{extra}"


def providers(shape, dtype, layout, mode, compiled):
    n, c_in, c_out, k, h, stride, groups = shape
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    conv = nn.Conv2d(c_in, c_out, k, stride=stride, padding=k // 2, groups=groups, bias=False)
    conv = conv.to(dtype, memory_format=memory_format)
    bn = nn.BatchNorm2d(c_out).to(dtype)
    fused, eager = cb.ConvBN2d.from_modules(conv, bn, "relu"), nn.Sequential(conv, bn, nn.ReLU())
    for module in (fused, eager):
        module.train(mode != "eval")
    backward = mode == "forward+backward"
    x = torch.randn(n, c_in, h, h).to(dtype).contiguous(memory_format=memory_format).requires_grad_(backward)
    grad = torch.randn(conv(x).shape).to(dtype).contiguous(memory_format=memory_format)

    def step(f, x=x, grad=grad):
        def run(keep=False):
            if not backward:
                with torch.no_grad():
                    return [f(x)]
            out = f(x)
            out.backward(grad)
            results = [out.detach(), x.grad, conv.weight.grad] if keep else None
            x.grad = conv.weight.grad = None
            return results

        return run

    result = {
        "ours": step(fused),
        "eager": step(eager),
        "conv alone": step(lambda x: F.conv2d(x, conv.weight, None, stride, k // 2, 1, groups)),
    }
    if layout == "contiguous":  # the peer that a user gets by converting model and data
        like = {"memory_format": torch.channels_last}
        last = x.detach().contiguous(**like).requires_grad_(backward)
        result["eager channels_last"] = step(copy.deepcopy(eager).to(**like), last, grad.contiguous(**like))
    if mode == "eval":
        result["folded"] = step(nn.Sequential(nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), bn.eval()), nn.ReLU()))
    if compiled:
        torch._dynamo.reset()
        result["torch.compile"] = step(torch.compile(eager))
    return result


def check(ours, eager, what: str) -> None:
    """In norm, outputs differ from eager's by rounding; gradients also where a pre-activation changed its sign, by the
    square root of how often that happens."""
    bounds = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (3e-2, 0.2)}
    for i, (a, b) in enumerate(zip(ours(keep=True), eager(keep=True), strict=True)):
        error, bound = ((a - b).norm() / b.norm()).item(), bounds[a.dtype][i > 0]
        if not error <= bound:
            raise SystemExit(f"{what}: the results differ from eager's by {error:.1e}, more than {bound:.0e}")


def picture(rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((r["dtype"], r["layout"], r["mode"]) for r in rows))
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    figure, axes = plt.subplots(len(groups), 1, figsize=(12, 2.4 * len(groups) + 1), squeeze=False, sharex=True)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        chosen = [r for r in rows if (r["dtype"], r["layout"], r["mode"]) == group]
        kinds = list(dict.fromkeys(r["provider"] for r in chosen))
        for i, kind in enumerate(kinds):
            values = {r["shape"]: r["vs_conv"] for r in chosen if r["provider"] == kind}
            axis.bar([shapes.index(s) + (i - len(kinds) / 2) * 0.16 for s in values], values.values(), 0.16, label=kind)
        axis.axhline(1, color="k", lw=0.5)
        axis.set_title(", ".join(group), fontsize=9)
        axis.set_ylabel("time / conv alone")
        axis.set_ylim(0, 4)
    axes[0, 0].legend(fontsize=8, ncol=5)
    axes[-1, 0].set_xticks(range(len(shapes)), shapes, rotation=30, ha="right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def summary(rows) -> list[str]:
    """What each provider takes over what ours does; of one dtype, layout and mode."""
    ours, lines = {r["shape"]: r for r in rows if r["provider"] == "ours"}, []
    for unseen in (False, True):
        ratios: dict[str, list[float]] = {}
        for r in rows:
            if r["unseen"] == unseen and r["provider"] != "ours":
                ratios.setdefault(r["provider"], []).append(r["p50"] / ours[r["shape"]]["p50"])
        means = [f"{name} x{geometric_mean(v):.2f} (least x{min(v):.2f})" for name, v in ratios.items()]
        if means:
            lines.append(f"{len(ratios['eager'])} {'unseen ' if unseen else ''}shapes: {', '.join(means)}")
    peak = geometric_mean(r["memory_vs_eager"] for r in ours.values())
    return [*lines, f"peak memory of ours over eager's x{peak:.2f}"]


def dtypes(device: str) -> list[str]:
    """Those that the device has code for; without it eager takes 20 times as long, and the bench hours."""
    if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return DTYPES
    print("bfloat16 is left out: oneDNN has no vector code for it on this CPU; --dtype bfloat16 measures it")
    return DTYPES[:1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: those that the device has code for")
    parser.add_argument("--layout", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--shape", nargs="+", default=[""], help="only shapes named so, for example 32x1024x14x14")
    parser.add_argument("--seconds", type=float, default=2.0, help="per shape and mode")
    parser.add_argument("--cold", action="store_true", help="empty the caches before every call")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (slow to warm up)")
    parser.add_argument("--quick", action="store_true", help="four shapes, half a second each")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    add_device_argument(parser)
    args = parser.parse_args()
    shapes = SHAPES[3:10:2] if args.quick else SHAPES + UNSEEN
    chosen = [shape for shape in shapes if name_of(shape).startswith(tuple(args.shape))]
    if not chosen:
        parser.error(f"--shape {' '.join(args.shape)}: none begins so; there are {', '.join(map(name_of, shapes))}")
    seconds = 0.5 if args.quick else args.seconds
    flush = torch.empty(2**26 if args.cold else 1)  # 256 MB
    env, rows, bandwidth = environment(), [], copy_bandwidth(64 if args.quick else 1024)
    configurations = list(itertools.product(args.dtype or dtypes(args.device), args.layout, args.mode))
    for dtype, layout, mode in configurations:
        for shape in chosen:
            runs = providers(shape, getattr(torch, dtype), layout, mode, args.compile)
            check(runs["ours"], runs["eager"], f"{dtype}, {layout}, {mode}, {name_of(shape)}")
            measured = interleave(runs, seconds, before=flush.zero_)
            common = {
                "shape": name_of(shape),
                "unseen": shape in UNSEEN,
                "dtype": dtype,
                "layout": layout,
                "mode": mode,
            }
            new = {
                provider: {
                    **common,
                    "provider": provider,
                    **m,
                    "peak_MB": peak_bytes(runs[provider]) / 1e6,
                    "vs_eager": measured["eager"]["p50"] / m["p50"],
                    "vs_conv": m["p50"] / measured["conv alone"]["p50"],
                    "vs_copy": m["p50"] / (1e3 * pass_bytes(shape, getattr(torch, dtype)) * PASSES[mode] / bandwidth),
                    **env,
                }
                for provider, m in measured.items()
            }
            for row in new.values():
                row["memory_vs_eager"] = row["peak_MB"] / new["eager"]["peak_MB"]
            rows += new.values()
            ours = new["ours"]
            print(
                f"conv_bn, ours, {mode}, {dtype}, {layout}, {ours['shape']}, ms p50={ours['p50']:.2f} "
                f"p20={ours['p20']:.2f} p80={ours['p80']:.2f}, x{ours['vs_eager']:.2f} eager, "
                f"x{1 / ours['vs_conv']:.2f} conv alone, {env['threads']} threads, {env['isa']}, "
                f"torch {env['torch']}, {env['commit']}",
                flush=True,
            )
    write_csv(args.out / "conv_bn.csv", rows)
    picture(rows, args.out / "conv_bn.png")
    for configuration in configurations:
        print(f"{', '.join(configuration)}, time over ours, geometric means:")
        print(*summary([r for r in rows if (r["dtype"], r["layout"], r["mode"]) == configuration]), sep="\n")


if __name__ == "__main__":
    main()
