"""Pictures and the table of ratios of bench_solve.py, from its rows."""

from __future__ import annotations

import csv
import math
from pathlib import Path

RTOL = 1e-6
PHASES = ("setup", "solve", "together")
OURS = {"ours auto": "auto", "ours block": "block_gmres"}  # name → method
GOALS = {("3x8x8", 8): ("SciPy GMRES", 100), ("3x32x32", 128): ("best", 5), ("16x16x16", 32): ("best", 5)}
_ABOUT = ("shape", "batch", "dtype", "provider", "phase")


def unless_measured_again(path: Path, rows: list[dict]) -> list[dict]:
    """Rows of an earlier run but those that ``rows`` replace."""
    again = {tuple(str(row[k]) for k in _ABOUT) for row in rows}
    with path.open() as file:
        kept = [row for row in csv.DictReader(file) if tuple(row[k] for k in _ABOUT) not in again]
    for row in kept:
        row |= {k: float(row[k]) for k in ("p20", "p50", "p80", "residual")}
        row |= {"batch": int(row["batch"]), "met": row["met"] == "True"}
    return kept


def draw(rows: list[dict], out: Path) -> None:
    """solve.png: every case and provider; solve_scaling.png: cost against the batch."""
    import matplotlib

    matplotlib.use("Agg")
    together = [r for r in rows if r["phase"] == "together"]
    if together:
        _draw_cases(together, out / "solve.png")
    scaling = [r for r in rows if r["phase"] == "scaling"]
    if scaling:
        _draw_scaling(scaling, out / "solve_scaling.png")


def _draw_cases(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    width = 0.9 / len(names)
    figure, panels = plt.subplots(
        len(dtypes), 1, figsize=(13, 4.5 * len(dtypes)), sharex=True, squeeze=False, layout="constrained"
    )
    cases = list(dict.fromkeys((r["shape"], r["batch"]) for r in rows))
    for ax, dtype in zip(panels[:, 0], dtypes, strict=True):
        for i, name in enumerate(names):
            mine = {(r["shape"], r["batch"]): r["p50"] for r in rows if (r["provider"], r["dtype"]) == (name, dtype)}
            places = [cases.index(c) + (i - (len(names) - 1) / 2) * width for c in mine]
            ax.bar(places, mine.values(), width, label=name, color=f"C{i}")
        ax.set_xticks(range(len(cases)), [f"{s} × {n}" for s, n in cases])
        ax.set(yscale="log", ylabel="ms, set-up and solve", title=dtype)
        ax.grid(axis="y", alpha=0.3)
    handles = {h.get_label(): h for ax in panels[:, 0] for h in ax.containers}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=len(names))
    figure.suptitle(f"x = BN(Conv(z)) solved to a relative residual of {RTOL}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_scaling(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for name in dict.fromkeys(r["provider"] for r in rows):
        chosen = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["batch"])
        batches, ms = [r["batch"] for r in chosen], [r["p50"] for r in chosen]
        ax.fill_between(batches, [r["p20"] for r in chosen], [r["p80"] for r in chosen], alpha=0.2)
        (line,) = ax.plot(batches, ms, "o-", label=name)
        linear = [ms[0] * b / batches[0] for b in batches]
        ax.plot(batches, linear, ":", color=line.get_color(), label=f"{name}, were it linear in the batch")
    ax.set(
        xscale="log", yscale="log", xlabel="samples in the batch", ylabel="ms, set-up and solve, p50 (band: p20–p80)"
    )
    ax.set_xticks(batches, batches)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.set_title(f"{rows[0]['shape']}, float32, to a relative residual of {RTOL}")
    ax.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ratios(rows: list[dict]) -> None:
    """Best peer over ours, set-up included, for every case as a table; SciPy and PETSc over ours for the loop alone."""
    timed = [r for r in rows if r["phase"] in PHASES]
    if timed:
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
        goal = GOALS.get(case[:2])
        print(
            f"| {case[0].replace('x', '×')} × {case[1]} | {case[2]} | {setup['p50']:.2f} + {solve['p50']:.2f} | "
            f"{best}, {peers[best]:.2f} | ×{peers[best] / mine:.1f} | {over_gmres} | "
            f"{f'×{goal[1]} {goal[0]}' if goal else ''} |"
        )
    loop = {r["provider"]: r["p50"] for r in rows if r["phase"] == "arnoldi"}
    for ours in (name for name in loop if name.startswith("ours")):
        others = ", ".join(f"x{ms / loop[ours]:.2f} {name}" for name, ms in loop.items() if not name.startswith("ours"))
        print(f"Arnoldi loop alone: {ours} {loop[ours]:.1f} ms, {others}")
