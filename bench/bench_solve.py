"""x = BN(Conv(z)) solved for z: ours against SciPy's LU and GMRES, dense LU and PETSc, all to one true residual.

    python bench/bench_solve.py [--quick] [--only cases arnoldi scaling] [--dtype float32] [--shape 3x8x8 …]
                                [--skip "ours block" …] [--add] [--device cuda] [--out out/bench]

Set-up is what the weights alone need: factorising, or inverting the symbol; ours starts from an empty cache. SciPy,
PETSc and torch get the matrix of A as a gift: assembling it is not timed. A float32 layer is solved by them in float32
where that reaches the tolerance and in float64 otherwise (column "inside"). Where a method works sample by sample and
the batch is large, a few samples are timed and the rest is extrapolated (column "samples"). PETSc takes part where
petsc4py can be imported (petsc_peer.py says how). With --device cuda ours and dense LU work there, the
others, and the loop alone, on the host.

Writes solve.csv, solve.png and solve_scaling.png into --out; the last lines are a table of the ratios to the peers.
With --add, parts and cases may be measured in several runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg as sla
import torch
from harness import add_device_argument, environment, interleave, write_csv
from petsc_peer import PETSc, petsc_solver
from problem import Problem
from solve_report import OURS, PHASES, RTOL, draw, ratios, unless_measured_again
from torch import Tensor

import convbn_ext as cb
from convbn_ext import cache
from convbn_ext.choice import choose
from convbn_ext.direct import cached_factor
from convbn_ext.preconditioners import circulant_inverse, precondition

CASES = [((3, 8, 8), batch) for batch in (1, 8, 128)] + [((3, 32, 32), batch) for batch in (1, 8, 128)]
CASES += [((16, 16, 16), 32), ((4, 24, 20), 16), ((3, 16, 16), 64)]
QUICK = [((3, 8, 8), 1), ((3, 8, 8), 8), ((3, 16, 16), 16)]


@dataclass(frozen=True)
class Provider:
    """Set-up from the weights, and z of the first ``samples`` from what the set-up returned."""

    setup: Callable[[], Any]
    solve: Callable[[Any], Tensor]
    samples: int
    inside: torch.dtype
    at_once: Callable[[], Tensor] | None = None  # both in one call


def ours(p: Problem, method: str) -> Provider:
    def setup() -> Any:
        cache.forget()
        op = cb.ConvBNOperator(p.conv, p.bn, p.x.shape[1:])
        choice = choose(op, len(p.x), method, "auto")
        if choice.layout is not None:
            cached_factor(op, choice.layout)
        else:
            precondition(op, choice.preconditioner, p.dtype)
        return cache._entries

    def solve(entries: Any) -> Tensor:
        cache._entries = entries  # other providers empty the cache
        return cb.solve(p.conv, p.bn, p.x, method=method, rtol=RTOL).z

    def at_once() -> Tensor:
        cache.forget()
        return cb.solve(p.conv, p.bn, p.x, method=method, rtol=RTOL).z

    return Provider(setup, solve, len(p.x), p.dtype, at_once)


def scipy_lu(p: Problem, inside: torch.dtype) -> Provider:
    A = p.matrix(inside).tocsc()
    return Provider(
        lambda: sla.splu(A),
        lambda lu: torch.from_numpy(lu.solve(p.rhs(inside).numpy().T).T),
        len(p.x),
        inside,
    )


def dense_lu(p: Problem, inside: torch.dtype) -> Provider:
    A, b = (t.to(p.x.device) for t in (torch.from_numpy(p.matrix(inside).toarray()), p.rhs(inside).T))
    return Provider(lambda: torch.linalg.lu_factor(A), lambda lu: torch.linalg.lu_solve(*lu, b).T, len(p.x), inside)


def few(p: Problem) -> int:
    """Samples that are timed by methods that take them one by one."""
    return len(p.x) if len(p.x) <= 8 and p.op.shape[1] < 1000 else 2


def circulant(p: Problem, inside: torch.dtype) -> Any:
    """Our preconditioner behind Γ⁻¹, as a function of NumPy vectors (n,)."""
    cache.forget()
    M, _ = circulant_inverse(p.host_op, inside)
    divide_out = p.host_op.channel_vector(1 / p.host_op.scale).to(inside)
    return lambda v: M.apply((torch.from_numpy(v) * divide_out)[None])[0].numpy()


def scipy_gmres(p: Problem, inside: torch.dtype) -> Provider:
    """With our circulant preconditioner and n-step restart."""
    A, n, samples = p.matrix(inside), p.op.shape[1], few(p)
    targets = RTOL / 2 * p.x.double().cpu().flatten(1).norm(dim=1)  # half is left for rounding

    def solve(M: Any) -> Tensor:
        M = sla.LinearOperator((n, n), matvec=M, dtype=A.dtype)
        rows = p.rhs(inside)[:samples].numpy()
        z = [
            sla.gmres(A, b, rtol=0.0, atol=float(t), restart=n, maxiter=3, M=M)[0]
            for b, t in zip(rows, targets, strict=False)
        ]
        return torch.from_numpy(np.stack(z))

    return Provider(lambda: circulant(p, inside), solve, samples, inside)


def petsc(p: Problem, kind: str) -> Provider:
    A, n = p.matrix(torch.float64), p.op.shape[1]
    samples = len(p.x) if kind == "lu" else few(p)
    atol = float(RTOL / 2 * p.x.double().flatten(1).norm(dim=1).min())

    def setup() -> Any:
        return petsc_solver(A, kind, atol, n, None if kind == "lu" else circulant(p, torch.float64))

    def solve(ksp: Any) -> Tensor:
        z = []
        x, b = ksp.getOperators()[0].createVecs()
        for row in p.rhs(torch.float64)[:samples].numpy():
            b.setArray(row)
            ksp.solve(b, x)
            z.append(x.getArray().copy())
        return torch.from_numpy(np.stack(z))

    return Provider(setup, solve, samples, torch.float64)


def providers(p: Problem, skip: list[str]) -> dict[str, tuple[Provider, float]]:
    """Every provider with its true residual; a peer that misses the tolerance in float32 works in float64."""
    result = {}
    for name, method in OURS.items():
        if name in skip:
            continue
        provider = ours(p, method)
        result[name] = provider, p.residual(provider.solve(provider.setup()))
    for name, make in {"SciPy LU": scipy_lu, "SciPy GMRES": scipy_gmres, "dense LU": dense_lu}.items():
        if name in skip:
            continue
        for inside in dict.fromkeys((p.dtype, torch.float64)):
            provider = make(p, inside)
            result[name] = provider, p.residual(provider.solve(provider.setup()))
            if result[name][1] <= RTOL:
                break
    for kind in ("lu", "gmres") if PETSc else ():
        name = f"PETSc {kind.upper()}"
        if name not in skip:
            provider = petsc(p, kind)
            result[name] = provider, p.residual(provider.solve(provider.setup()))
    return result


def runs(provider: Provider) -> dict[str, Callable[[], object]]:
    state = provider.setup()
    return {
        "setup": provider.setup,
        "solve": lambda: provider.solve(state),
        "together": provider.at_once or (lambda: provider.solve(provider.setup())),
    }


def named(shape: tuple[int, ...], batch: int, dtype: torch.dtype, provider: str, phase: str) -> dict[str, Any]:
    """The columns that say what a row is about."""
    return {
        "shape": "x".join(map(str, shape)),
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "provider": provider,
        "phase": phase,
    }


def scaled(measured: dict[str, float], factor: float) -> dict[str, float]:
    return {k: v * factor if k in ("p20", "p50", "p80") else v for k, v in measured.items()}


def measure_case(
    shape: tuple[int, ...], batch: int, dtype: torch.dtype, skip: list[str], seconds: float, least: int
) -> list[dict]:
    p = Problem(shape, batch, dtype)
    chosen = providers(p, skip)
    calls = {(name, phase): call for name, (provider, _) in chosen.items() for phase, call in runs(provider).items()}
    times = interleave(calls, seconds, least)
    rows = []
    for name, (provider, residual) in chosen.items():
        factor = batch / provider.samples
        solve = scaled(times[name, "solve"], factor)
        setup = times[name, "setup"]
        together = scaled(times[name, "together"], 1)
        for q in ("p20", "p50", "p80"):  # only the solve grows with the samples
            together[q] += (1 - 1 / factor) * solve[q]
        for phase, m in zip(PHASES, (setup, solve, together), strict=True):
            rows.append(
                {
                    **named(shape, batch, dtype, name, phase),
                    **m,
                    "residual": residual,
                    "met": residual <= RTOL,
                    "inside": str(provider.inside).removeprefix("torch."),
                    "samples": provider.samples,
                }
            )
        few_samples = f", extrapolated from {provider.samples} samples" if factor > 1 else ""
        print(
            f"solve, {name}, {rows[-1]['dtype']}, {rows[-1]['shape']} x {batch}, "
            f"ms p50={together['p50']:.2f} p20={together['p20']:.2f} p80={together['p80']:.2f} "
            f"(set-up {setup['p50']:.2f}, solve {solve['p50']:.2f}), residual {residual:.1e}"
            f"{'' if residual <= RTOL else ' MISSED'}, inside {rows[-1]['inside']}{few_samples}",
            flush=True,
        )
    return rows


def measure_arnoldi(shape: tuple[int, ...], steps: int, seconds: float, least: int) -> list[dict]:
    """The loop alone: CSR matrix, float64, no preconditioner, no restart; ours CGS2, SciPy MGS, PETSc CGS or CGS2.

    SciPy's and PETSc's loops have one thread; ours runs on one and on all.
    """
    p = Problem(shape, 1, torch.float64)
    A, b = p.matrix(torch.float64), p.rhs(torch.float64)[0].numpy()
    options = {"rtol": 0.0, "restart": steps, "maxiter": 1}
    threads = torch.get_num_threads()

    def on_one_thread() -> Any:
        torch.set_num_threads(1)
        try:
            return cb.gmres(A, b, **options)[0]
        finally:
            torch.set_num_threads(threads)

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: cb.gmres(A, b, **options)[0],
        "ours, 1 thread": on_one_thread,
        "SciPy GMRES": lambda: sla.gmres(A, b, **options)[0],
    }
    counts: dict[str, list] = {name: [] for name in calls}
    for name, steps_of in counts.items():
        solver = sla.gmres if name == "SciPy GMRES" else cb.gmres
        solver(A, b, **options, callback=steps_of.append, callback_type="pr_norm")
    for twice in (False, True) if PETSc else ():
        name = "PETSc GMRES, CGS2" if twice else "PETSc GMRES, CGS"
        ksp = petsc_solver(A, "gmres", 0.0, steps, twice=twice)
        x, v = ksp.getOperators()[0].createVecs()
        v.setArray(b)

        def by_petsc(ksp: Any = ksp, x: Any = x, v: Any = v) -> Any:
            ksp.solve(v, x)
            return x.getArray()

        by_petsc()
        calls[name], counts[name] = by_petsc, [None] * ksp.getIterationNumber()
    rows = []
    times = interleave(calls, seconds, least)
    for name, call in calls.items():
        residual = float(np.linalg.norm(b - A @ call()) / np.linalg.norm(b))
        m = times[name]
        about = named(shape, 1, torch.float64, name, "arnoldi")
        rows.append({**about, **m, "residual": residual, "steps": len(counts[name])})
        print(
            f"arnoldi, {name}, float64, n={len(b)}, {len(counts[name])} steps, ms p50={m['p50']:.2f} "
            f"p20={m['p20']:.2f} p80={m['p80']:.2f}, residual {residual:.12e}",
            flush=True,
        )
    return rows


def measure_scaling(
    shape: tuple[int, ...], batches: list[int], skip: list[str], seconds: float, least: int
) -> list[dict]:
    """Ours, float32, against the batch, set-up included."""
    calls, residuals = {}, {}
    for batch in batches:
        p = Problem(shape, batch, torch.float32)
        for name, method in OURS.items():
            if name in skip:
                continue
            provider = ours(p, method)
            residuals[name, batch] = p.residual(provider.solve(provider.setup()))
            calls[name, batch] = runs(provider)["together"]
    times = interleave(calls, seconds, least)
    rows = []
    for (name, batch), m in times.items():
        about = named(shape, batch, torch.float32, name, "scaling")
        rows.append({**about, **m, "residual": residuals[name, batch]})
        print(f"scaling, {name}, {rows[-1]['shape']} x {batch}, ms p50={m['p50']:.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["cases", "arnoldi", "scaling"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, help="parts to measure (all)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"], choices=["float32", "float64"])
    parser.add_argument("--shape", nargs="+", help="only cases of these shapes, for example 3x32x32")
    parser.add_argument("--skip", nargs="+", default=[], help="providers to leave out, for example 'SciPy GMRES'")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time per case")
    parser.add_argument("--quick", action="store_true", help="small cases, three rounds each")
    parser.add_argument("--add", action="store_true", help="to what is in solve.csv already")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    add_device_argument(parser)
    args = parser.parse_args()
    seconds, least = (0.5, 3) if args.quick else (args.seconds, 5)
    rows: list[dict] = []
    for dtype in args.dtype if "cases" in args.only else ():
        for shape, batch in QUICK if args.quick else CASES:
            if args.shape and "x".join(map(str, shape)) not in args.shape:
                continue
            rows += measure_case(shape, batch, getattr(torch, dtype), args.skip, seconds, least)
    loop_shape = (3, 16, 16) if args.quick else (3, 32, 32)
    if "arnoldi" in args.only and args.device == "cpu":
        rows += measure_arnoldi(loop_shape, 100 if args.quick else 300, seconds, least)
    if "scaling" in args.only:
        batches = [2**i for i in range(5 if args.quick else 9)]
        rows += measure_scaling(loop_shape, batches, args.skip, seconds, least)
    env = environment()
    rows = [{**row, **env} for row in rows]
    if args.add:
        rows = [*unless_measured_again(args.out / "solve.csv", rows), *rows]
    write_csv(args.out / "solve.csv", rows)
    draw(rows, args.out)
    print(", ".join(f"{k} {v}" for k, v in env.items()))
    ratios(rows)


if __name__ == "__main__":
    main()
