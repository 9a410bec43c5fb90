"""Run CUDA kernels on the CPU from Python: tensors in guarded buffers, three builds, reports and traffic.

Each test runs in the plain and in the instrumented build; with ``SIMT_BUILD=asan`` (and libasan preloaded, see the
Makefile) in the sanitizers' build instead.
"""

import ctypes
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIBRARIES = Path(os.environ.get("SIMT_OUT", ROOT / "build" / "simt"))
BUILDS = (os.environ["SIMT_BUILD"],) if "SIMT_BUILD" in os.environ else ("plain", "instrumented")
SOURCE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
ORDERS = ("ascending", "descending", "random")


def why_not() -> str | None:
    """Why the harness cannot run here, or None."""
    kernels = [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in SOURCE_SUFFIXES - {".cpp"}]
    sources = kernels + [p for p in HERE.iterdir() if p.suffix in SOURCE_SUFFIXES]
    newest = max(p.stat().st_mtime for p in sources)
    for build in BUILDS:
        library = LIBRARIES / f"libsimt_{build}.so"
        if not library.exists():
            return "the CUDA kernels are executed by `make simt`, which has not been run here"
        if library.stat().st_mtime < newest:
            return "build/simt is older than the kernels: run `make simt`"
    return None


@dataclass(frozen=True)
class Report:
    kind: str
    kernel: str
    line: str
    text: str


@dataclass(frozen=True)
class Traffic:
    """What one instruction moved: 32-byte sectors of a global buffer, or passes over the banks of shared memory."""

    kernel: str
    line: str
    region: str
    space: str
    mode: str
    requests: int
    bytes: int
    moved: int
    ideal: int


class Buffer:
    """A tensor's copy in device memory: guard zones around it, read-only if the kernel must not write it."""

    def __init__(self, simulator: "Simulator", tensor: torch.Tensor, name: str, read_only: bool, offset: int):
        assert tensor.is_contiguous()
        self.tensor, self.name, self.bytes, self.read_only = (
            tensor,
            name,
            tensor.numel() * tensor.element_size(),
            read_only,
        )
        self._library = simulator.library
        self.address = self._library.simt_allocate(self.bytes, offset, name.encode(), int(read_only))
        assert self.address
        ctypes.memmove(self.address, tensor.data_ptr(), self.bytes)

    def read(self) -> torch.Tensor:
        """What the device memory holds now."""
        assert self.address, f"{self.name} has been freed"
        result = torch.empty_like(self.tensor)
        ctypes.memmove(result.data_ptr(), self.address, self.bytes)
        return result

    def free(self) -> None:
        if self.read_only:
            assert torch.equal(self.read().view(torch.uint8), self.tensor.view(torch.uint8)), f"{self.name} was written"
        address, self.address = self.address, None
        assert self._library.simt_free(address), f"a kernel wrote beside {self.name}"


class VirtualBuffer(Buffer):
    """A tensor larger than the machine: zeros until written, seen through windows (plain build)."""

    def __init__(self, simulator: "Simulator", count: int, dtype: torch.dtype):
        self.dtype, self.bytes, self._library = dtype, count * dtype.itemsize, simulator.library
        self.address = self._library.simt_map(ctypes.c_size_t(self.bytes))

    def write(self, offset: int, values: torch.Tensor) -> None:
        values = values.to(self.dtype).contiguous()
        ctypes.memmove(self.address + offset * self.dtype.itemsize, values.data_ptr(), values.numel() * values.itemsize)

    def window(self, offset: int, count: int) -> torch.Tensor:
        result = torch.empty(count, dtype=self.dtype)
        ctypes.memmove(result.data_ptr(), self.address + offset * self.dtype.itemsize, count * self.dtype.itemsize)
        return result

    def free(self) -> None:
        address, self.address = self.address, None
        self._library.simt_unmap(ctypes.c_void_p(address), ctypes.c_size_t(self.bytes))


Argument = Buffer | int | float | ctypes.Array | None


class Simulator:
    """One build of the kernels.

    >>> sim = Simulator("plain")
    >>> out = sim.output("out", torch.zeros(1))
    >>> sim.run("clean_sum", sim.input("x", x), out, n)
    >>> out.read()
    """

    def __init__(self, build: str):
        self.build = build
        self.library = ctypes.CDLL(str(LIBRARIES / f"libsimt_{build}.so"))
        self.library.simt_allocate.restype = ctypes.c_void_p
        self.library.simt_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int]
        self.library.simt_map.restype = ctypes.c_void_p
        self.library.simt_blocks.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self.library.simt_free.argtypes = [ctypes.c_void_p]
        self.library.simt_reports.restype = ctypes.c_char_p
        self.library.simt_traffic.restype = ctypes.c_char_p
        self.library.simt_footprints.restype = ctypes.c_char_p
        self._buffers: list[Buffer] = []
        self._stderr = ""

    def schedule(self, order: str, seed: int = 1, preempt: int = 0) -> None:
        """Order of blocks and lanes; the instrumented build can also switch lanes at one in ``preempt`` accesses."""
        self.library.simt_configure(ORDERS.index(order), seed, preempt)

    def input(self, name: str, tensor: torch.Tensor, offset: int = 0) -> Buffer:
        self._buffers.append(Buffer(self, tensor.contiguous(), name, True, offset))
        return self._buffers[-1]

    def output(self, name: str, tensor: torch.Tensor, offset: int = 0) -> Buffer:
        """A buffer that kernels may write; fill it with NaN, so that an element nobody writes is seen."""
        self._buffers.append(Buffer(self, tensor.contiguous(), name, False, offset))
        return self._buffers[-1]

    def virtual(self, count: int, dtype: torch.dtype) -> VirtualBuffer:
        """``count`` scalars without memory behind them."""
        self._buffers.append(VirtualBuffer(self, count, dtype))
        return self._buffers[-1]

    def blocks(self, first: int = 0, count: int = 0) -> None:
        """Launches run these blocks of their grids alone; without arguments all again."""
        self.library.simt_blocks(first, count)

    def call(self, function: str, *arguments: Argument) -> int:
        """Call an exported function; ints become int64, floats double, None a null pointer."""
        entry = getattr(self.library, function)
        entry.restype = ctypes.c_int64
        converted = []
        for argument in arguments:
            if argument is None or isinstance(argument, Buffer):
                converted.append(ctypes.c_void_p(argument.address if argument else None))
            elif isinstance(argument, ctypes.Array):
                converted.append(argument)
            else:
                converted.append(ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
        return entry(*converted)

    def run(self, launcher: str, *arguments: Argument) -> None:
        """Call an exported launcher; what the undefined-behaviour sanitizer prints becomes reports."""
        with tempfile.TemporaryFile() as caught:
            saved = os.dup(2)
            os.dup2(caught.fileno(), 2)
            try:
                self.call(launcher, *arguments)
            finally:
                os.dup2(saved, 2)
                os.close(saved)
            caught.seek(0)
            self._stderr += caught.read().decode(errors="replace")

    def reports(self) -> list[Report]:
        """What the engine and the sanitizers have found since the last call."""
        found = [Report(*line.split("|", 3)) for line in self.library.simt_reports().decode().splitlines()]
        for line in self._stderr.splitlines():
            if "runtime error:" in line:
                where, text = line.split(": runtime error: ", 1)
                found.append(Report("undefined-behaviour", "", Path(where).name, text))
        self._stderr = ""
        return found

    def traffic(self) -> list[Traffic]:
        """Per instruction and buffer, since the last call (instrumented build)."""
        rows = [line.split("|") for line in self.library.simt_traffic().decode().splitlines()]
        return [Traffic(*row[:5], *map(int, row[5:])) for row in rows]

    def footprints(self) -> dict[tuple[str, str, str], int]:
        """(kernel, buffer, read or write) → different 32-byte sectors touched per launch, since the last call: what
        memory has to move when caches keep whatever is used twice."""
        rows = [line.rsplit("|", 3) for line in self.library.simt_footprints().decode().splitlines()]
        return {(kernel, buffer, mode): int(sectors) for kernel, buffer, mode, sectors in rows}

    def close(self) -> None:
        """Free the buffers; guard zones and inputs must be untouched."""
        buffers, self._buffers = self._buffers, []
        for buffer in buffers:
            buffer.free()


_simulators: dict[str, Simulator] = {}


def simulator(build: str) -> Simulator:
    """The build's library, loaded once."""
    if build not in _simulators:
        _simulators[build] = Simulator(build)
    return _simulators[build]
