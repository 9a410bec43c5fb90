"""The experiment: can z be recovered from x = BN(Conv(z)), by which method, at what cost?

1. Random batches of 8×3×8×8 and 16×3×8×8 through Conv2d(3, 3, 3, padding=1) + BatchNorm2d at their initial parameters:
   error3 = ‖BN(Conv(z)) − x‖/‖x‖ per batch in three norms, for SciPy's GMRES on the whole batch as one system and for
   every method of ours.
2. Conditioning and iterations over image size, initialisation and padding.
3. Real images: 3×32×32 crops of photographs and, if a directory is given, CIFAR-10 in its binary version.
4. A large layer: 4×64×56×56 in float32 to 1e-4, and the memory that it takes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .demo import layer_on, photograph_crops
from .errors import errors
from .experiment_report import (
    INITIALISATIONS,
    PADDINGS,
    PROVIDERS,
    RTOL,
    SCIPY,
    SCIPY_ALONE,
    Conditioning,
    Trial,
    draw_batches,
    draw_conditioning,
    findings,
    write_csv,
)
from .operator import ConvBNOperator
from .solve import solve


def trial(
    case: str,
    batch: int,
    provider: str,
    z_true: Tensor,
    conv: Any,
    bn: Any,
    run: Callable[[Tensor], tuple[Tensor, str, int]],
) -> Trial:
    """Send z_true (N, C, H, W) through the layer, run a solver on the output and measure it."""
    with torch.no_grad():
        x = bn(conv(z_true))
    start = time.perf_counter()
    z, status, iterations = run(x)
    seconds = time.perf_counter() - start
    found = errors(z_true, z, x, conv, bn)
    return Trial(case, batch, provider, status, iterations, seconds, *found.error1, *found.error3)


def ours(conv: Any, bn: Any, provider: str, rtol: float = RTOL) -> Callable[[Tensor], tuple[Tensor, str, int]]:
    """`solve` with a provider's options."""

    def run(x: Tensor) -> tuple[Tensor, str, int]:
        result = solve(conv, bn, x, rtol=rtol, **PROVIDERS[provider])  # type: ignore[arg-type]
        failed = [status for status in result.status if status != "converged"]
        return result.z, failed[0] if failed else "converged", int(result.iterations.max())

    return run


def scipys(conv: Any, bn: Any, cycles: int | None) -> Callable[[Tensor], tuple[Tensor, str, int]]:
    """SciPy's gmres with its defaults (rtol 1e-5, restart 20) on the batch flattened into one system.

    Args:
        conv: convolution.
        bn: batch normalisation.
        cycles: most restart cycles; None is SciPy's default, ten times the number of unknowns.
    """
    from scipy.sparse.linalg import LinearOperator, gmres

    def run(x: Tensor) -> tuple[Tensor, str, int]:
        op = ConvBNOperator(conv, bn, x.shape[1:])
        steps = 0

        def apply(v: Any) -> Any:
            return op.matvec(torch.from_numpy(v).reshape(len(x), -1)).flatten().numpy()

        def count(_: float) -> None:
            nonlocal steps
            steps += 1

        A = LinearOperator((x.numel(), x.numel()), matvec=apply, dtype=float)
        b = (x.flatten(1) - op.channel_vector(op.offset)).flatten().numpy()
        z, info = gmres(A, b, maxiter=cycles, callback=count, callback_type="pr_norm")
        return torch.from_numpy(z).reshape(x.shape), "converged" if info == 0 else "maxiter", steps

    return run


def initial_layer(seed: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Conv2d(3, 3, 3, padding=1) and BatchNorm2d at their initial parameters, evaluation mode, float64."""
    torch.manual_seed(seed)
    return nn.Conv2d(3, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double().eval()


def random_batches(batches: int, scipy_cycles: int, alone: bool) -> Iterator[Trial]:
    """Part 1, with SciPy's restart cycles limited; ``alone``: the first batch also with SciPy's own limit.

    That limit, ten times the number of unknowns in cycles, takes half a minute per batch and gains nothing.
    """
    for size in (8, 16):
        case = f"{size}x3x8x8"
        for k in range(batches):
            conv, bn = initial_layer(k)
            z = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
            yield trial(case, k, SCIPY, z, conv, bn, scipys(conv, bn, scipy_cycles))
            if alone and (size, k) == (8, 0):
                yield trial(case, k, SCIPY_ALONE, z, conv, bn, scipys(conv, bn, None))
            for provider in PROVIDERS:
                yield trial(case, k, provider, z, conv, bn, ours(conv, bn, provider))


def layer(initialisation: str, padding: str, crops: Tensor) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A 3→3 layer with kernel 3: as initialised, near the identity, or trained to sharpen blurred crops."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode=padding).double()  # type: ignore[arg-type]
    bn = nn.BatchNorm2d(3, momentum=None).double()
    if initialisation == "identity + noise":
        with torch.no_grad():
            conv.weight.copy_(nn.init.dirac_(torch.empty_like(conv.weight)) + 0.1 * torch.randn_like(conv.weight))
    elif initialisation == "trained":
        sharp = crops - crops.mean((0, 2, 3), keepdim=True)
        blurred = nn.functional.avg_pool2d(nn.functional.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        optimizer = torch.optim.Adam([*conv.parameters(), *bn.parameters()], lr=0.02)
        for _ in range(60):
            loss = (bn(conv(blurred)) - sharp).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    bn.reset_running_stats()
    with torch.no_grad():
        bn.train()(conv(crops))
    return conv, bn.eval()


def conditioning(sizes: tuple[int, ...], crops: Tensor) -> Iterator[Conditioning]:
    """Part 2: every size, initialisation and padding, four right-hand sides each."""
    for initialisation in INITIALISATIONS:
        for padding in PADDINGS:
            conv, bn = layer(initialisation, padding, crops[:64])
            for size in sizes:
                z = torch.rand(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
                op = ConvBNOperator(conv, bn, (3, size, size))
                exact = size <= 16
                condition = float(torch.linalg.cond(op.to_sparse().to_dense())) if exact else op.symbol_cond()
                t = trial("", 0, "circulant", z, conv, bn, ours(conv, bn, "circulant"))
                border = 3 * (size**2 - (size - 2) ** 2)
                yield Conditioning(
                    size,
                    initialisation,
                    padding,
                    condition,
                    exact,
                    border,
                    t.iterations,
                    t.status,
                    t.error1_2,
                    t.error3_2,
                )


def cifar10_records(directory: Path) -> tuple[Tensor, Tensor]:
    """Labels (N,) and images (N, 3, 32, 32) of CIFAR-10's binary version, both uint8.

    Raises:
        ValueError: the directory holds no ``*_batch*.bin``, or a file that is not made of 3073-byte records.
    """
    files = sorted(directory.glob("**/*_batch*.bin"))
    if not files:
        raise ValueError(f"--cifar {directory} holds no data_batch_*.bin or test_batch.bin (CIFAR-10's binary version)")
    records = []
    for file in files:
        data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        if data.numel() == 0 or data.numel() % 3073:
            raise ValueError(f"{file} has {data.numel()} bytes, not a multiple of 3073 (label and 3×32×32 pixels)")
        records.append(data.reshape(-1, 3073))
    table = torch.cat(records)
    return table[:, 0], table[:, 1:].reshape(-1, 3, 32, 32)


def cifar10(directory: Path) -> Tensor:
    """Images of CIFAR-10's binary version, (N, 3, 32, 32) float64 in [0, 1]."""
    return cifar10_records(directory)[1].double() / 255


def real_images(count: int, crops: Tensor, case: str) -> Iterator[Trial]:
    """Part 3: a batch of real images, float32 and float64, with every method but the plain ones."""
    conv, bn = layer_on(crops[:5000], seed=0)
    z = crops[torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))[:count]]
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float64, RTOL)):
        conv, bn = conv.to(dtype), bn.to(dtype)
        for provider in PROVIDERS:
            if provider not in ("plain", "row"):  # they need about n = 3072 steps
                name = f"{case} {str(dtype)[6:]}"
                yield trial(name, 0, provider, z.to(dtype), conv, bn, ours(conv, bn, provider, rtol))


def large_layer() -> Trial:
    """Part 4: Conv2d(64, 64, 3, padding=1) + BatchNorm2d on 56×56 images, four of them."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, momentum=None)
    z = torch.rand(4, 64, 56, 56)
    with torch.no_grad():
        bn(conv(z))
    bn.eval()
    return trial("4x64x56x56 float32, to 1e-4", 0, "auto", z, conv, bn, ours(conv, bn, "auto", 1e-4))


def main(arguments: argparse.Namespace) -> int:
    """Run the parts (quick: but the last) and write the CSV files, pictures and findings.md into ``arguments.out``.

    Returns:
        0, or 1 when ``auto`` failed on a batch.
    """
    for package in ("sklearn", "PIL", "matplotlib", "scipy"):
        importlib.import_module(package)
    import matplotlib

    matplotlib.use("Agg")
    quick, out = arguments.quick, arguments.out
    crops = photograph_crops()
    sources = {"crops": crops} if arguments.cifar is None else {"crops": crops, "CIFAR-10": cifar10(arguments.cifar)}
    out.mkdir(parents=True, exist_ok=True)

    cycles = 20 if quick else 100
    trials = list(_shown(random_batches(2 if quick else 30, cycles, alone=not quick)))
    conditions = list(_shown(conditioning((8, 12) if quick else (8, 16, 32), crops)))
    count = 8 if quick else 128
    images = [
        t for name, source in sources.items() for t in _shown(real_images(count, source, f"{name} {count}x3x32x32"))
    ]

    if not quick:
        images += _shown(iter([large_layer()]))

    write_csv(trials, out / "random.csv")
    write_csv(conditions, out / "conditioning.csv")
    write_csv(images, out / "images.csv")
    for case in dict.fromkeys(t.case for t in trials):
        draw_batches(trials, case, out / f"random_{case}.png")
    draw_conditioning(conditions, out / "conditioning.png")
    text = findings(trials, conditions, images, cycles)
    (out / "findings.md").write_text(text)
    print(f"{text}\nwritten: {out}")
    return 0 if all(t.status == "converged" for t in [*trials, *images] if t.provider == "auto") else 1


def _shown(rows: Iterator[Any]) -> Iterator[Any]:
    """Pass rows through, each with a line on stderr."""
    for row in rows:
        print(*(f"{v:.1e}" if isinstance(v, float) else v for v in asdict(row).values()), file=sys.stderr)
        yield row
