"""Interleaved timing of several providers in one process, and one CSV row per measurement.

Calls are timed on torch's default device: with a clock on the CPU, with events on the current stream of a GPU, there
after its L2 cache has been overwritten.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
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
    device = torch.get_default_device()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "?",
    }


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device, which becomes torch's default device."""

    def choose(name: str) -> str:
        if torch.device(name).type == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"no GPU here that torch {torch.__version__} can use")
        torch.set_default_device(name)
        return name

    parser.add_argument("--device", type=choose, default="cpu", help="cpu, cuda or cuda:1")


def copy_bandwidth(megabytes: int = 1024) -> float:
    """Bytes read and written per second by a copy on the default device: the floor of every memory-bound kernel."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    milliseconds = interleave({"copy": lambda: target.copy_(source)}, seconds=0.5)["copy"]["p50"]
    return 2 * source.numel() / (milliseconds / 1e3)


def _wall_clock(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


class _EventClock:
    """Milliseconds of a call on the current stream, with a cold L2 cache, without the launch of its first kernel."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.get_default_device()).L2_cache_size
        self._flush = torch.empty(2 * max(cache, 1 << 20), dtype=torch.uint8)

    def __call__(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # also keeps the GPU busy while the host queues what follows
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


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
    clock = _EventClock() if torch.get_default_device().type == "cuda" else _wall_clock
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        for i in range(len(names)):
            name = names[(i + rounds) % len(names)]
            before()
            fault = _faults()
            times[name].append(clock(providers[name]))
            faults[name].append(_faults() - fault)
        rounds += 1
    result = {}
    for name in names:
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        result[name] = {"p20": p20, "p50": p50, "p80": p80, "faults": statistics.median(faults[name]), "rounds": rounds}
    return result


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that are alive at once during a call, beyond those that were alive before it."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would tell about each of its runs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


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
