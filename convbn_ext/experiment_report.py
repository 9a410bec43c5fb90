"""What the experiment writes: CSV files, pictures, and findings computed from the rows."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

RTOL = 1e-10
NORMS = ("1-norm", "2-norm", "max-norm")
PROVIDERS = {  # options of solve
    "plain": {"method": "gmres", "preconditioner": "none"},
    "row": {"method": "gmres", "preconditioner": "row"},
    "circulant": {"method": "gmres", "preconditioner": "circulant"},
    "block": {"method": "block_gmres", "preconditioner": "circulant"},
    "LU": {"method": "direct"},
    "auto": {"method": "auto"},
}
SCIPY = "SciPy gmres"
SCIPY_ALONE = "SciPy gmres, no limit"
INITIALISATIONS = ("default", "identity + noise", "trained")
PADDINGS = ("zeros", "circular", "reflect", "replicate")


@dataclass
class Trial:
    """One layer, one batch, one method; one row of the CSV files."""

    case: str
    batch: int
    provider: str
    status: str  # the worst of the samples' statuses
    iterations: int
    seconds: float
    error1_1: float
    error1_2: float
    error1_max: float
    error3_1: float
    error3_2: float
    error3_max: float

    @property
    def error3(self) -> tuple[float, float, float]:
        """In the 1-, 2- and max-norm."""
        return self.error3_1, self.error3_2, self.error3_max


@dataclass
class Conditioning:
    """One layer and how hard it is; one row of conditioning.csv."""

    size: int
    initialisation: str
    padding: str
    condition: float  # of A where it is small enough to be formed, else of its symbol
    exact: bool
    border: int  # C × border positions, the most steps that the circulant preconditioner leaves
    iterations: int
    status: str
    error1: float
    error3: float


def write_csv(rows: list[Any], path: Path) -> None:
    """One line per dataclass row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def draw_batches(trials: list[Trial], case: str, path: Path) -> None:
    """error3 of every batch, one panel per norm, one line per method."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), sharey=True, layout="constrained")
    for panel, (ax, norm) in enumerate(zip(axes, NORMS, strict=True)):
        for provider in (SCIPY, *PROVIDERS):
            rows = [t for t in trials if t.case == case and t.provider == provider]
            style = {"color": "black", "marker": "x"} if provider == SCIPY else {"marker": ".", "alpha": 0.8}
            ax.semilogy([t.batch for t in rows], [t.error3[panel] for t in rows], label=provider, **style)
        ax.set(xlabel="batch", title=norm)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("error3 = ‖BN(Conv(z)) − x‖ / ‖x‖")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{case} through Conv2d(3, 3, 3, padding=1) + BatchNorm2d at initial parameters, and back")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_conditioning(rows: list[Conditioning], path: Path) -> None:
    """Condition number and circulant-preconditioned steps over image size, one panel per initialisation."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), sharex=True, sharey="row", layout="constrained")
    for (upper, lower), initialisation in zip(axes.T, INITIALISATIONS, strict=True):
        chosen = [r for r in rows if r.initialisation == initialisation]
        for padding in PADDINGS:
            line = [r for r in chosen if r.padding == padding]
            upper.loglog([r.size for r in line], [r.condition for r in line], marker=".", label=padding)
            lower.loglog([r.size for r in line], [max(r.iterations, 1) for r in line], marker=".")
        zeros = [r for r in chosen if r.padding == "zeros"]
        lower.loglog(
            [r.size for r in zeros], [r.border for r in zeros], color="0.6", ls="--", label="C × border positions"
        )
        upper.set_title(initialisation)
        lower.minorticks_off()
        lower.set(xlabel="image size", xticks=[r.size for r in zeros], xticklabels=[r.size for r in zeros])
    axes[0, 0].set_ylabel("condition number")
    axes[0, 0].legend(title="padding")
    axes[1, 0].set_ylabel(f"GMRES steps to {RTOL:g}, circulant")
    axes[1, 0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def findings(trials: list[Trial], conditions: list[Conditioning], images: list[Trial], scipy_cycles: int) -> str:
    """What the rows say, computed from them."""
    text = ["# Findings", "", _scipys_story(trials, scipy_cycles), ""]
    for case in dict.fromkeys(t.case for t in trials):
        text.append(
            f"**{case}.** Median over the batches of error3 (2-norm), its worst, iterations, seconds per batch:"
        )
        text += ["", "| method | median | worst | converged | iterations | seconds |", "|---|---|---|---|---|---|"]
        text += [_table_row([t for t in trials if t.case == case and t.provider == p]) for p in (SCIPY, *PROVIDERS)]
        text.append("")
    hard = max(conditions, key=lambda r: r.condition)
    circular = [r for r in conditions if r.padding == "circular"]
    failed = [r for r in conditions if r.status != "converged"]
    text += [
        f"**Conditioning.** The condition number lies between {min(r.condition for r in conditions):.1e} and "
        f"{hard.condition:.1e} ({hard.initialisation}, {hard.padding} padding, {hard.size}×{hard.size}). A small "
        f"error3 is not a recovered z: there error1 is {hard.error1:.1e} at error3 {hard.error3:.1e}. With circular "
        f"padding the circulant preconditioner is exact: at most "
        f"{max(r.iterations for r in circular)} steps. "
        f"With the others it needs at most {max(r.iterations / r.border for r in conditions):.2f} times C × border "
        "positions. "
        + (f"{len(failed)} of {len(conditions)} layers were not solved." if failed else "Every layer was solved."),
        "",
    ]
    for case in dict.fromkeys(t.case for t in images):
        rows = [t for t in images if t.case == case]
        best = min((t for t in rows if t.status == "converged"), key=lambda t: t.seconds, default=None)
        text += [f"**{case}.** No method converged." if best is None else f"**{case}.** {_fastest(best)}", ""]
    text.append(f"Peak memory of the whole run: {peak_memory() / 2**30:.2f} GiB.")
    return "\n".join(text) + "\n"


def _scipys_story(trials: list[Trial], cycles: int) -> str:
    scipy = [t for t in trials if t.provider == SCIPY]
    solved = sum(t.status == "converged" for t in scipy)
    auto = [t for t in trials if t.provider == "auto"]
    story = (
        f"**SciPy's call**, the whole batch as one system, restart 20, here stopped after {cycles} cycles "
        f"({20 * cycles} steps): {solved} of {len(scipy)} batches converge, error3 in the 2-norm is "
        f"{min(t.error3_2 for t in scipy):.2g} … {max(t.error3_2 for t in scipy):.2g}."
    )
    for t in trials:
        if t.provider == SCIPY_ALONE:
            limited = next(s for s in scipy if (s.case, s.batch) == (t.case, t.batch))
            story += (
                f" Left alone on batch {t.batch} of {t.case} it ends after {t.iterations} steps and {t.seconds:.0f} s "
                f"at {t.error3_2:.2g}, against {limited.error3_2:.2g} where it was stopped."
            )
    return story + (
        f" Ours, left to choose its method: {sum(t.status == 'converged' for t in auto)} of {len(auto)} converge, "
        f"error3 at most {max(t.error3_2 for t in auto):.1e}, error1 at most {max(t.error1_2 for t in auto):.1e}."
    )


def peak_memory() -> int:
    """Most bytes of memory that the process has held."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _fastest(t: Trial) -> str:
    return f"Fastest: {t.provider}, {t.seconds:.2f} s, error3 {t.error3_2:.1e}, error1 {t.error1_2:.1e}."


def _table_row(rows: list[Trial]) -> str:
    errors3 = torch.tensor([t.error3_2 for t in rows])
    converged = sum(t.status == "converged" for t in rows)
    seconds = torch.tensor([t.seconds for t in rows]).median()
    return (
        f"| {rows[0].provider} | {errors3.median():.1e} | {errors3.max():.1e} | {converged}/{len(rows)} "
        f"| {max(t.iterations for t in rows)} | {seconds:.3f} |"
    )
