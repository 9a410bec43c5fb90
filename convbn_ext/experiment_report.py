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
LABELS = {  # in pictures: label, colour, marker, line
    "SciPy gmres": ("the original's call: SciPy's gmres, its defaults", "black", "x", "-"),
    "plain": ("ours: GMRES without preconditioner", "C0", "o", "-"),
    "row": ("ours: GMRES, row equilibration", "C1", "+", "--"),
    "circulant": ("ours: GMRES, circulant", "C2", ".", "-"),
    "block": ("ours: block GMRES, circulant", "C3", "v", "-"),
    "LU": ("ours: LU", "C4", "s", "-"),
    "auto": ('ours: method="auto"', "C5", ".", "--"),
}
SCIPY = "SciPy gmres"
SCIPY_ALONE = "SciPy gmres to its end"
STILL = 100  # cycles without change after which SciPy's call is ended
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
    condition: float
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

    figure, axes = plt.subplots(1, 3, figsize=(15, 5.6), sharey=True, layout="constrained")
    for panel, (ax, norm) in enumerate(zip(axes, NORMS, strict=True)):
        for provider, (label, colour, marker, line) in LABELS.items():
            rows = [t for t in trials if t.case == case and t.provider == provider]
            ax.semilogy(
                [t.batch for t in rows],
                [t.error3[panel] for t in rows],
                color=colour,
                marker=marker,
                linestyle=line,
                linewidth=0.8,
                fillstyle="none",
                label=label,
            )
        ax.axhline(RTOL, color="0.5", linestyle=":", label="asked of ours, in the 2-norm")
        ax.set(xlabel="batch", title=norm)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("error3 = ‖BN(Conv(z)) − x‖ / ‖x‖")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
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
    axes[0, 0].set_ylabel("condition number of A")
    axes[0, 0].legend(title="padding")
    axes[1, 0].set_ylabel(f"GMRES steps to {RTOL:g}, circulant")
    axes[1, 0].legend()
    figure.suptitle("Conv2d(3, 3, 3, padding=1) + BatchNorm2d by size, initialisation and padding")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def findings(
    trials: list[Trial], conditions: list[Conditioning], images: list[Trial], seconds: dict[str, float]
) -> str:
    """What the rows say, computed from them."""
    text = ["# Findings", "", _scipys_story(trials), ""]
    for case in dict.fromkeys(t.case for t in trials):
        text.append(
            f"**{case}.** Median over the batches of error3 (2-norm), its worst, iterations, seconds per batch:"
        )
        text += ["", "| method | median | worst | converged | iterations | seconds |", "|---|---|---|---|---|---|"]
        text += [_table_row([t for t in trials if t.case == case and t.provider == p]) for p in (SCIPY, *PROVIDERS)]
        text.append("")
    hard = max(conditions, key=lambda r: r.condition)
    far = max(conditions, key=lambda r: r.error1)
    circular = [r for r in conditions if r.padding == "circular"]
    failed = [r for r in conditions if r.status != "converged"]
    text += [
        f"**Conditioning.** The condition number lies between {min(r.condition for r in conditions):.1e} and "
        f"{hard.condition:.1e} ({hard.initialisation}, {hard.padding} padding, {hard.size}×{hard.size}). A small "
        f"error3 is not a recovered z: error1 reaches {far.error1:.1e} at error3 {far.error3:.1e} "
        f"({far.initialisation}, {far.padding}, {far.size}×{far.size}). With circular padding the circulant "
        f"preconditioner is exact: at most {max(r.iterations for r in circular)} steps. "
        f"With the others it needs at most {max(r.iterations / r.border for r in conditions):.2f} times C × border "
        "positions. "
        + (f"{len(failed)} of {len(conditions)} layers were not solved." if failed else "Every layer was solved."),
        "",
    ]
    text += ["**Real images, and a large layer:**", ""]
    text += ["| case | method | status | iterations | seconds | error3 | error1 |", "|---" * 7 + "|"]
    text += [
        f"| {t.case} | {t.provider} | {t.status} | {t.iterations} | {t.seconds:.2f} | {t.error3_2:.1e} "
        f"| {t.error1_2:.1e} |"
        for t in images
    ]
    text.append("")
    parts = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    memory = f"Peak memory: {peak_memory() / 2**30:.2f} GiB."
    text.append(f"Time, {torch.get_num_threads()} thread(s) for ours: {parts}. {memory}")
    return "\n".join(text) + "\n"


def _scipys_story(trials: list[Trial]) -> str:
    scipy = [t for t in trials if t.provider == SCIPY]
    auto = [t for t in trials if t.provider == "auto"]
    count = {status: sum(t.status == status for t in scipy) for status in ("converged", "stagnation", "maxiter")}
    most = max(t.iterations for t in scipy)
    story = (
        f"**SciPy's call**, the whole batch as one system, its defaults (restart 20): {count['converged']} of "
        f"{len(scipy)} batches converge, error3 in the 2-norm is {min(t.error3_2 for t in scipy):.2g} … "
        f"{max(t.error3_2 for t in scipy):.2g}."
    )
    if count["stagnation"]:
        story += (
            f" On {count['stagnation']} of them it came to stand still within {most} steps: {STILL} cycles changed no "
            "digit of the residual, and it was ended, as every further cycle repeats them."
        )
    if count["maxiter"]:
        story += f" {count['maxiter']} were ended by a limit of {most} steps."
    for t in trials:
        if t.provider == SCIPY_ALONE:
            ended = next(s for s in scipy if (s.case, s.batch) == (t.case, t.batch))
            story += (
                f" Left alone on batch {t.batch} of {t.case} it goes on to {t.iterations} steps and {t.seconds:.0f} s, "
                f"at {t.error3_2:.6g}, against {ended.error3_2:.6g} where it was ended after {ended.iterations} steps."
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


def _table_row(rows: list[Trial]) -> str:
    errors3 = torch.tensor([t.error3_2 for t in rows])
    converged = sum(t.status == "converged" for t in rows)
    seconds = torch.tensor([t.seconds for t in rows]).median()
    return (
        f"| {rows[0].provider} | {errors3.median():.1e} | {errors3.max():.1e} | {converged}/{len(rows)} "
        f"| {max(t.iterations for t in rows)} | {seconds:.3f} |"
    )
