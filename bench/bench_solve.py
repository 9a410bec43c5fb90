"""x = BN(Conv(z)) solved for z: ours against SciPy's LU and GMRES, dense LU and PETSc, all to one true residual.

    python bench/bench_solve.py [--quick] [--dtype float32] [--shape 3x8x8 …] [--skip "ours block" …] [--out out/bench]

Set-up is what the weights alone need: factorising, or inverting the symbol; ours starts from an empty cache. SciPy,
PETSc and torch get the matrix of A as a gift: assembling it is not timed. A float32 layer is solved by them in float32
where that reaches the tolerance and in float64 otherwise (column "inside"). Where a method works sample by sample and
the batch is large, a few samples are timed and the rest is extrapolated (column "samples"). PETSc takes part where
petsc4py can be imported.

Writes solve.csv and solve.png into --out; the last lines are a table of the ratios to the peers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg as sla
import torch
from harness import environment, interleave, write_csv
from petsc_peer import PETSc, petsc_solver
from problem import Problem
from torch import Tensor

import convbn_ext as cb
from convbn_ext import cache
from convbn_ext.choice import choose
from convbn_ext.direct import cached_factor
from convbn_ext.preconditioners import circulant_inverse, precondition

RTOL = 1e-6
CASES = [((3, 8, 8), batch) for batch in (1, 8, 128)] + [((3, 32, 32), batch) for batch in (1, 8, 128)]
CASES += [((16, 16, 16), 32), ((4, 24, 20), 16), ((3, 16, 16), 64)]
QUICK = [((3, 8, 8), 1), ((3, 8, 8), 8), ((3, 16, 16), 16)]
GOALS = {((3, 8, 8), 8): ("SciPy GMRES", 100), ((3, 32, 32), 128): ("best", 5), ((16, 16, 16), 32): ("best", 5)}
PHASES = ("setup", "solve", "together")
OURS = {"ours auto": "auto", "ours block": "block_gmres"}  # name → method


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
    A = torch.from_numpy(p.matrix(inside).toarray())
    return Provider(
        lambda: torch.linalg.lu_factor(A), lambda lu: torch.linalg.lu_solve(*lu, p.rhs(inside).T).T, len(p.x), inside
    )


def few(p: Problem) -> int:
    """Samples that are timed by methods that take them one by one."""
    return len(p.x) if len(p.x) <= 8 and p.op.shape[1] < 1000 else 2


def circulant(p: Problem, inside: torch.dtype) -> Any:
    """Our preconditioner behind Γ⁻¹, as a function of NumPy vectors (n,)."""
    cache.forget()
    M, _ = circulant_inverse(p.op, inside)
    divide_out = p.op.channel_vector(1 / p.op.scale).to(inside)
    return lambda v: M.apply((torch.from_numpy(v) * divide_out)[None])[0].numpy()


def scipy_gmres(p: Problem, inside: torch.dtype) -> Provider:
    """With our circulant preconditioner and n-step restart."""
    A, n, samples = p.matrix(inside), p.op.shape[1], few(p)
    targets = RTOL / 2 * p.x.double().flatten(1).norm(dim=1)  # half is left for rounding

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
        provider = petsc(p, kind)
        result[f"PETSc {kind.upper()}"] = provider, p.residual(provider.solve(provider.setup()))
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
    """The loop alone: CSR matrix, float64, no preconditioner, no restart; ours CGS2, SciPy MGS, PETSc CGS or CGS2."""
    p = Problem(shape, 1, torch.float64)
    A, b = p.matrix(torch.float64), p.rhs(torch.float64)[0].numpy()
    options = {"rtol": 0.0, "restart": steps, "maxiter": 1}
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: cb.gmres(A, b, **options)[0],
        "SciPy GMRES": lambda: sla.gmres(A, b, **options)[0],
    }
    counts: dict[str, list] = {"ours": [], "SciPy GMRES": []}
    for name, solver in (("ours", cb.gmres), ("SciPy GMRES", sla.gmres)):
        solver(A, b, **options, callback=counts[name].append, callback_type="pr_norm")
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


def picture(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, scaling) = plt.subplots(2, 1, figsize=(12, 9))
    together = [r for r in rows if r["phase"] == "together"]
    cases = list(dict.fromkeys((r["shape"], r["batch"], r["dtype"]) for r in together))
    names = list(dict.fromkeys(r["provider"] for r in together))
    width = 0.9 / len(names)
    for i, name in enumerate(names):
        values = {(r["shape"], r["batch"], r["dtype"]): r["p50"] for r in together if r["provider"] == name}
        places = [cases.index(c) + (i - (len(names) - 1) / 2) * width for c in values]
        bars.bar(places, values.values(), width, label=name)
    bars.set_xticks(range(len(cases)), [f"{s} × {n}\n{d}" for s, n, d in cases], fontsize=8)
    bars.set(yscale="log", ylabel="ms, set-up and solve", title=f"x = BN(Conv(z)) to a relative residual of {RTOL}")
    bars.legend(fontsize=8, ncol=len(names))
    points = [r for r in rows if r["phase"] == "scaling"]
    for name in dict.fromkeys(r["provider"] for r in points):
        chosen = [r for r in points if r["provider"] == name]
        batches = [r["batch"] for r in chosen]
        scaling.fill_between(batches, [r["p20"] for r in chosen], [r["p80"] for r in chosen], alpha=0.2)
        (line,) = scaling.plot(batches, [r["p50"] for r in chosen], "o-", label=name)
        start = chosen[0]["p50"]
        scaling.plot(batches, [start * b for b in batches], ":", color=line.get_color(), label="linear in the batch")
    scaling.set(xscale="log", yscale="log", xlabel="batch", ylabel="ms, set-up and solve")
    scaling.set_title(f"cost against batch, {points[0]['shape']}, float32")
    scaling.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def ratios(rows: list[dict]) -> None:
    """Best peer over ours, set-up included, for every case as a table; SciPy and PETSc over ours for the loop alone."""
    timed = [r for r in rows if r["phase"] in PHASES]
    print("| case | dtype | ours, set-up + solve ms | best peer, ms | | SciPy GMRES | goal |\n" + "|---" * 7 + "|")
    for case in dict.fromkeys((r["shape"], r["batch"], r["dtype"]) for r in timed):
        chosen = {(r["provider"], r["phase"]): r for r in timed if (r["shape"], r["batch"], r["dtype"]) == case}
        setup, solve, together = (chosen["ours auto", phase] for phase in PHASES)
        mine = together["p50"] if together["met"] else math.inf
        peers = {
            name: r["p50"]
            for (name, phase), r in chosen.items()
            if phase == "together" and name not in OURS and r["met"]
        }
        best = min(peers, key=peers.__getitem__)
        over_gmres = f"×{peers['SciPy GMRES'] / mine:.0f}" if "SciPy GMRES" in peers else "–"
        goal = GOALS.get((tuple(map(int, case[0].split("x"))), case[1]))
        print(
            f"| {case[0]} × {case[1]} | {case[2]} | {setup['p50']:.2f} + {solve['p50']:.2f} | "
            f"{best}, {peers[best]:.2f} | ×{peers[best] / mine:.1f} | {over_gmres} | "
            f"{f'×{goal[1]} {goal[0]}' if goal else ''} |"
        )
    loop = {r["provider"]: r["p50"] for r in rows if r["phase"] == "arnoldi"}
    others = ", ".join(f"x{ms / loop['ours']:.2f} {name}" for name, ms in loop.items() if name != "ours")
    print(f"Arnoldi loop alone: {loop['ours']:.1f} ms, {others}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"], choices=["float32", "float64"])
    parser.add_argument("--shape", nargs="+", help="only cases of these shapes, for example 3x32x32")
    parser.add_argument("--skip", nargs="+", default=[], help="providers to leave out, for example 'SciPy GMRES'")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time per case")
    parser.add_argument("--quick", action="store_true", help="small cases, three rounds each")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    seconds, least = (0.5, 3) if args.quick else (args.seconds, 5)
    rows: list[dict] = []
    for dtype in args.dtype:
        for shape, batch in QUICK if args.quick else CASES:
            if args.shape and "x".join(map(str, shape)) not in args.shape:
                continue
            rows += measure_case(shape, batch, getattr(torch, dtype), args.skip, seconds, least)
    rows += measure_arnoldi((3, 16, 16) if args.quick else (3, 32, 32), 100 if args.quick else 300, seconds, least)
    batches = [2**i for i in range(5 if args.quick else 9)]
    rows += measure_scaling((3, 16, 16) if args.quick else (3, 32, 32), batches, args.skip, seconds, least)
    env = environment()
    write_csv(args.out / "solve.csv", [{**row, **env} for row in rows])
    picture(rows, args.out / "solve.png")
    print(", ".join(f"{k} {v}" for k, v in env.items()))
    ratios(rows)


if __name__ == "__main__":
    main()
