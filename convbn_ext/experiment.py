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
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
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
    STILL,
    Conditioning,
    Trial,
    draw_batches,
    draw_conditioning,
    findings,
    write_csv,
)
from .operator import ConvBNOperator
from .solve import solve

QUICK_CYCLES = 20  # of SciPy's call with --quick
SIZES = (8, 16)  # samples in a batch of part 1
Solver = Callable[[Tensor], tuple[Tensor, str, int]]  # x → z, status, iterations


def trial(
    case: str,
    batch: int,
    provider: str,
    z_true: Tensor,
    conv: Any,
    bn: Any,
    run: Solver,
) -> Trial:
    """Send z_true (N, C, H, W) through the layer, run a solver on the output and measure it."""
    with torch.no_grad():
        x = bn(conv(z_true))
    start = time.perf_counter()
    z, status, iterations = run(x)
    seconds = time.perf_counter() - start
    found = errors(z_true, z, x, conv, bn)
    return Trial(case, batch, provider, status, iterations, seconds, *found.error1, *found.error3)


def ours(conv: Any, bn: Any, provider: str, rtol: float = RTOL) -> Solver:
    """`solve` with a provider's options."""

    def run(x: Tensor) -> tuple[Tensor, str, int]:
        result = solve(conv, bn, x, rtol=rtol, **PROVIDERS[provider])  # type: ignore[arg-type]
        failed = [status for status in result.status if status != "converged"]
        return result.z, failed[0] if failed else "converged", int(result.iterations.max())

    return run


def scipys(conv: Any, bn: Any, cycles: int | None = None, alone: bool = False) -> Solver:
    """SciPy's gmres with its defaults (rtol 1e-5, restart 20, 10 n cycles) on the batch flattened into one system.

    What a cycle does follows from the residual that it starts from: once the residual's norm stands still, the cycles
    that are left repeat one another, and the call is ended.

    Args:
        conv: convolution.
        bn: batch normalisation.
        cycles: most restart cycles; None is SciPy's default.
        alone: the call comes to its own end, however long it stands still.
    """
    from scipy.sparse.linalg import LinearOperator, gmres

    def run(x: Tensor) -> tuple[Tensor, str, int]:
        op = ConvBNOperator(conv, bn, x.shape[1:])
        b = (x.flatten(1) - op.channel_vector(op.offset)).flatten().numpy()
        norms: list[float] = []  # after each cycle

        def apply(v: Any) -> Any:
            return op.matvec(torch.from_numpy(v).reshape(len(x), -1)).flatten().numpy()

        def watch(z: Any) -> None:
            norms.append(float(torch.linalg.vector_norm(torch.from_numpy(b - apply(z)))))
            if not alone and len(norms) > STILL and norms[-1 - STILL] <= norms[-1] * (1 + 1e-12):
                raise _StandsStill(z)

        A = LinearOperator((x.numel(), x.numel()), matvec=apply, dtype=float)
        try:
            z, info = gmres(A, b, maxiter=cycles, callback=watch, callback_type="x")
            status = "converged" if info == 0 else "maxiter"
        except _StandsStill as still:
            z, status = still.args[0], "stagnation"
        return torch.from_numpy(z).reshape(x.shape), status, 20 * len(norms)

    return run


class _StandsStill(Exception):
    """Carries the iterate."""


def initial_layer(seed: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Conv2d(3, 3, 3, padding=1) and BatchNorm2d at their initial parameters, evaluation mode, float64."""
    torch.manual_seed(seed)
    return nn.Conv2d(3, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double().eval()


def random_batch(size: int, k: int) -> tuple[str, Tensor, nn.Conv2d, nn.BatchNorm2d]:
    """Number k of the batches of part 1: the case's name, z (size, 3, 8, 8) and a layer of its own."""
    z = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    return f"{size}x3x8x8", z, *initial_layer(k)


def random_batches(batches: int) -> Iterator[Trial]:
    """Part 1, ours."""
    for size in SIZES:
        for k in range(batches):
            case, z, conv, bn = random_batch(size, k)
            for provider in PROVIDERS:
                yield trial(case, k, provider, z, conv, bn, ours(conv, bn, provider))


def scipy_batch(size: int, k: int, cycles: int | None, alone: bool) -> Trial:
    """Part 1, SciPy's call on one batch: for a process of its own."""
    torch.set_num_threads(1)
    case, z, conv, bn = random_batch(size, k)
    return trial(case, k, SCIPY_ALONE if alone else SCIPY, z, conv, bn, scipys(conv, bn, cycles, alone))


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


def condition_number(op: ConvBNOperator) -> float:
    """‖A‖₂ ‖A⁻¹‖₂ of a square operator to three digits: Lanczos' method on A Aᵀ and, with a sparse LU, its inverse."""
    from scipy import sparse
    from scipy.sparse.linalg import LinearOperator, eigsh, splu

    entries = op.to_sparse()
    A = sparse.csc_array((entries.values().numpy(), tuple(entries.indices().numpy())), shape=op.shape)
    lu, start = splu(A), torch.ones(op.shape[0], dtype=torch.float64).numpy()

    def largest(apply: Callable[[Any], Any]) -> float:
        gram = LinearOperator(op.shape, matvec=apply, dtype=float)
        return math.sqrt(eigsh(gram, k=1, tol=1e-4, v0=start, return_eigenvectors=False)[0])

    return largest(lambda v: A @ (A.T @ v)) * largest(lambda v: lu.solve(lu.solve(v), trans="T"))


def conditioning(sizes: tuple[int, ...], crops: Tensor) -> Iterator[Conditioning]:
    """Part 2: every size, initialisation and padding, four right-hand sides each."""
    for initialisation in INITIALISATIONS:
        for padding in PADDINGS:
            conv, bn = layer(initialisation, padding, crops[:64])
            for size in sizes:
                z = torch.rand(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
                op = ConvBNOperator(conv, bn, (3, size, size))
                t = trial("", 0, "circulant", z, conv, bn, ours(conv, bn, "circulant"))
                border = 3 * (size**2 - (size - 2) ** 2)
                yield Conditioning(
                    size,
                    initialisation,
                    padding,
                    condition_number(op),
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
    """Part 3: a batch of real images, float32 and float64, by every method that does not need n = 3072 steps.

    GMRES sample by sample takes a few of them: every sample has its own basis of some 300 vectors.
    """
    conv, bn = layer_on(crops[:5000], seed=0)
    z = crops[torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))[:count]]
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float64, RTOL)):
        conv, bn = conv.to(dtype), bn.to(dtype)
        for provider, samples in (("circulant", min(count, 8)), ("block", count), ("LU", count), ("auto", count)):
            name = f"{case} {samples}x3x32x32 {str(dtype)[6:]}"
            yield trial(name, 0, provider, z[:samples].to(dtype), conv, bn, ours(conv, bn, provider, rtol))


def large_layer() -> Iterator[Trial]:
    """Part 4: Conv2d(64, 64, 3, padding=1) + BatchNorm2d on 56×56 images, four of them."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64, momentum=None)
    z = torch.rand(4, 64, 56, 56)
    with torch.no_grad():
        bn(conv(z))
    bn.eval()
    yield trial("4x64x56x56 float32, to 1e-4", 0, "auto", z, conv, bn, ours(conv, bn, "auto", 1e-4))


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

    stages = Stages()
    batches, count = (2, 8) if quick else (30, 128)
    calls: list[tuple[int, int, int | None, bool]] = []
    if not quick:
        calls += [(SIZES[0], k, None, True) for k in range(min(arguments.scipy_alone, batches))]
    calls += [(size, k, QUICK_CYCLES if quick else None, False) for size in SIZES for k in range(batches)]
    trials = stages.run(f"{2 * batches} random batches", random_batches(batches))
    conditions = stages.run("conditioning", conditioning((8, 12) if quick else (8, 16, 32), crops))
    images = []
    for name, source in sources.items():
        images += stages.run(f"{name} images", real_images(count, source, name))
    if not quick:
        images += stages.run("large layer", large_layer())
    # SciPy's calls take the longest and have one thread: a process per core, when ours leave the cores to them
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        scipy = as_completed([pool.submit(scipy_batch, *call) for call in calls])
        trials += stages.run("SciPy's calls", (future.result() for future in scipy))

    trials.sort(key=lambda t: (SIZES.index(int(t.case.split("x")[0])), t.batch))
    write_csv(trials, out / "random.csv")
    write_csv(conditions, out / "conditioning.csv")
    write_csv(images, out / "images.csv")
    for case in dict.fromkeys(t.case for t in trials):
        draw_batches(trials, case, out / f"random_{case}.png")
    draw_conditioning(conditions, out / "conditioning.png")
    text = findings(trials, conditions, images, stages.seconds)
    (out / "findings.md").write_text(text)
    print(f"{text}\nwritten: {out}")
    return 0 if all(t.status == "converged" for t in [*trials, *images] if t.provider == "auto") else 1


class Stages:
    """Shows rows as they come, one line each on stderr, and takes the time of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, rows: Iterator[Any]) -> list[Any]:
        """All the rows."""
        start, found = time.perf_counter(), []
        for row in rows:
            print(*(f"{v:.1e}" if isinstance(v, float) else v for v in asdict(row).values()), file=sys.stderr)
            found.append(row)
        self.seconds[name] = time.perf_counter() - start
        print(f"{name}: {self.seconds[name]:.1f} s", file=sys.stderr)
        return found
