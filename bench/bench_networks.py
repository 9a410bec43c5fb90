"""Whole networks, 3×32×32, batch 128: training step of ResNet-18 and of a depthwise-separable network, and memory.

    python bench/bench_networks.py [--quick] [--dtype float32] [--compile] [--device cuda]
    python bench/bench_networks.py --activation silu --exact --batch 32     # losses, against those in float64
    python bench/bench_networks.py --network resnet18 --batch 32 --lr 1e-4 --seconds 1    # losses, behind ReLU

Ours in every memory mode against eager torch and torch.compile: ms per step (forward, loss, backward, SGD), bytes that
wait for the backward pass, and the largest relative difference of the losses over --steps steps from eager's, or with
--exact from those of float64. Eager torch on contiguous tensors beside eager on channels_last ones shows what rounding
alone does: with ReLU a value that rounding moves across zero changes the gradient by a jump, and training amplifies it,
for torch as for us, unless the learning rate is small; behind a smooth activation nothing jumps. Writes networks.csv
into --out.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import add_device_argument, environment, interleave, write_csv
from torch import Tensor, nn

import convbn_ext as cb

MEMORY = ["save", "chain", "recompute"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class Block(nn.Module):
    """Two 3×3 layers and a sum; the way past has a layer where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.act = activation()
        self.past = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.past = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """act(BN(conv(act(BN(conv(x))))) + past(x))"""
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(out + self.past(x))


class FusedBlock(nn.Module):
    """The same with our layers on the same parameters."""

    def __init__(self, block: Block, memory: str) -> None:
        super().__init__()
        layer = cb.ConvBN2d.from_modules
        self.first = layer(block.conv1, block.bn1, block.act, memory=memory)
        self.second = layer(block.conv2, block.bn2, block.act, memory=memory)
        self.past = layer(*block.past, memory=memory) if len(block.past) else None

    def forward(self, x: Tensor) -> Tensor:
        """As Block's."""
        return self.second(self.first(x), residual=x if self.past is None else self.past(x))


def resnet18(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """ResNet-18 with the stem for small images: 3×3, no pooling."""
    widths = [
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
        (512, 512, 1),
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), activation(),
        *(Block(*w, activation) for w in widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def separable(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """MobileNet's layers: 3×3 per channel, then 1×1, each with batch normalisation and activation."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), activation()]
    for c_in, c_out, stride in [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]:
        layers += [nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False), nn.BatchNorm2d(c_in), activation()]
        layers += [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def fused(network: nn.Sequential, memory: str) -> nn.Sequential:
    """Conv, BN, activation in a row and blocks become our layers, on the same parameters."""
    result: list[nn.Module] = []
    modules = list(network)
    while modules:
        module = modules.pop(0)
        if isinstance(module, nn.Conv2d):
            bn, act = modules.pop(0), modules.pop(0)
            result.append(cb.ConvBN2d.from_modules(module, bn, act, memory=memory))
        else:
            result.append(FusedBlock(module, memory) if isinstance(module, Block) else module)
    return nn.Sequential(*result)


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct tensors that wait for the backward pass, parameters and the input left out."""
    own = {t.untyped_storage().data_ptr() for t in (x, *network.parameters())}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(x)
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in own)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet18", "separable"], choices=["resnet18", "separable"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--layout", nargs="+", default=["channels_last"], choices=["channels_last", "contiguous"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=60.0, help="per network")
    parser.add_argument("--steps", type=int, default=50, help="over which losses are compared")
    parser.add_argument("--lr", type=float, default=0.01, help="of SGD")
    parser.add_argument("--activation", default="relu", choices=ACTIVATIONS)
    parser.add_argument("--exact", action="store_true", help="compare the losses with those of eager in float64 (slow)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (slow to warm up)")
    parser.add_argument("--quick", action="store_true", help="batch 32, five seconds, five steps")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    add_device_argument(parser)
    args = parser.parse_args()
    batch, seconds, steps = (32, 5.0, 5) if args.quick else (args.batch, args.seconds, args.steps)
    rows: list[dict[str, object]] = []
    for name in args.network:
        for dtype in args.dtype:
            for layout in args.layout:
                activation = ACTIVATIONS[args.activation]
                rows += measure(
                    name, dtype, layout, batch, seconds, steps, args.lr, args.compile, activation, args.exact
                )
    write_csv(args.out / "networks.csv", rows)


def measure(
    name: str,
    dtype: str,
    layout: str,
    batch: int,
    seconds: float,
    steps: int,
    lr: float,
    compiled: bool,
    activation: type[nn.Module],
    exact: bool,
) -> list[dict[str, object]]:
    """One row per provider."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    plain = {"resnet18": resnet18, "separable": separable}[name](activation)
    plain = plain.to(getattr(torch, dtype), memory_format=memory_format)
    x = torch.randn(batch, 3, 32, 32).to(getattr(torch, dtype)).contiguous(memory_format=memory_format)
    target = torch.randint(10, (batch,))
    networks: dict[str, nn.Module] = {"eager": copy.deepcopy(plain)}
    networks |= {f"ours {m}": fused(copy.deepcopy(plain), m) for m in MEMORY}
    inputs: dict[str, Tensor] = {}  # other than x
    if layout == "channels_last":  # torch against itself: how far rounding alone takes the losses apart
        networks["eager contiguous"] = copy.deepcopy(plain).to(memory_format=torch.contiguous_format)
        inputs["eager contiguous"] = x.contiguous()
    if compiled:
        networks["torch.compile"] = torch.compile(copy.deepcopy(plain))  # type: ignore[assignment]
    losses: dict[str, list[float]] = {k: [] for k in (*networks, "float64")}

    def step(kind: str, network: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(network.parameters(), lr=lr)

        def run() -> None:
            out = network(inputs.get(kind, x))
            loss = F.cross_entropy(out if out.dtype == torch.float64 else out.float(), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[kind].append(loss.item())

        return run

    bytes_ = {k: saved_bytes(copy.deepcopy(n), inputs.get(k, x)) for k, n in networks.items() if k != "torch.compile"}
    gc.collect()
    times = interleave({k: step(k, n) for k, n in networks.items()}, seconds, least=5)
    runs = {k: step(k, n) for k, n in networks.items()}
    while len(losses["eager"]) < steps:
        for run in runs.values():
            run()
    reference = "eager"
    if exact:
        reference, inputs["float64"] = "float64", x.double()
        run = step("float64", copy.deepcopy(plain).double())
        for _ in range(steps):
            run()
    best = min(times[k]["p50"] for k in networks if not k.startswith("ours"))
    rows: list[dict[str, object]] = []
    for kind, t in times.items():
        pairs = zip(losses[kind][:steps], losses[reference][:steps], strict=True)
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        share = bytes_[kind] / bytes_["eager"] if kind in bytes_ else float("nan")
        rows.append(
            {"network": name, "dtype": dtype, "layout": layout, "batch": batch, "activation": activation.__name__,
             "provider": kind, **t,
             "vs_best": best / t["p50"], "saved_MB": bytes_.get(kind, float("nan")) / 1e6, "saved_vs_eager": share,
             "losses_apart": apart, "losses_from": reference, **environment()}
        )  # fmt: skip
        print(
            f"{name}, {kind}, {dtype}, {layout}, batch {batch}: ms p50={t['p50']:.0f} p20={t['p20']:.0f} "
            f"p80={t['p80']:.0f}, x{best / t['p50']:.2f} the better of the others, saved x{share:.2f} eager, losses "
            f"{apart:.1e} from {reference}'s over {steps} steps, {t['faults']:.0f} faults",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
