"""Interleaved timing of several providers in one process, and one CSV row per measurement."""

from __future__ import annotations

import csv
import math
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the code."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return {
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "?",
    }


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def interleave(
    providers: dict[str, Callable[[], object]], seconds: float = 2.0, least: int = 7, before: Callable[[], object] = int
) -> dict[str, dict[str, float]]:
    """Run the providers in turn until the time is used up; ms p20, p50, p80 and page faults per call of each.

    Each round visits every provider once and starts with another one, so that drift and neighbours hit all alike.
    ``before`` runs untimed ahead of every call (to empty the caches, for example).
    """
    names = list(providers)
    times: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[int]] = {name: [] for name in names}
    for name in names:  # warm-up: allocations, primitive caches, compilation
        for _ in range(2):
            providers[name]()
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        for i in range(len(names)):
            name = names[(i + rounds) % len(names)]
            before()
            fault = _faults()
            begin = time.perf_counter()
            providers[name]()
            times[name].append((time.perf_counter() - begin) * 1e3)
            faults[name].append(_faults() - fault)
        rounds += 1
    result = {}
    for name in names:
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        result[name] = {"p20": p20, "p50": p50, "p80": p80, "faults": statistics.median(faults[name]), "rounds": rounds}
    return result


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """One row per measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
