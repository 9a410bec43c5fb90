"""A build with CUDA kernels, inspected without a GPU: registration, architectures, registers, spills, 128-bit accesses.

``make cuda`` makes it; ``python -m tests.test_cuda_build`` in build/cuda prints the table for cuda_resources.csv.
"""

import csv
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import convbn_ext._build_info as build_info

TABLE = Path(__file__).with_name("cuda_resources.csv")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
OPERATORS = ("conv_bn_forward", "conv_bn_backward", "krylov_orthonormalize", "krylov_combine", "krylov_norms")

pytestmark = pytest.mark.skipif(
    not getattr(build_info, "CUDA_ARCHITECTURES", []), reason="this build has no CUDA kernels: `make cuda` makes one"
)


def cuobjdump(*arguments):
    """Output of cuobjdump for the extension; cuobjdump and nvdisasm come from the toolkit or from PyPI."""
    package = importlib.util.find_spec("nvidia")
    folders = [f"{root}/cu13/bin" for root in package.submodule_search_locations] if package else []
    path = os.pathsep.join([os.environ["PATH"], *folders])
    tool = shutil.which("cuobjdump", path=path)
    assert tool, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    command = [tool, *arguments, importlib.util.find_spec("convbn_ext._C").origin]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PATH": path}).stdout


def demangle(text):
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


# "void convbn::bn_apply_kernel<true, convbn::Relu, float, 4>(…)" → ("bn_apply", "NHWC", "float", 4)
KERNEL = re.compile(
    r"(?P<name>\w+)_kernel(?:<(?:(?P<layout>true|false), )?(?:convbn::\w+, )?(?P<scalar>\w+)(?:, (?P<pack>\d+))?>)?\("
)
LAYOUTS = {"true": "NHWC", "false": "NCHW", None: ""}


def family(signature):
    match = KERNEL.search(signature.replace("(bool)1", "true").replace("(bool)0", "false").replace("(int)", ""))
    assert match, signature
    scalar = (match["scalar"] or "").removeprefix("__").removeprefix("nv_")
    return match["name"], LAYOUTS[match["layout"]], scalar, match["pack"] or ""


@functools.cache
def resources():
    """(family) → architecture → (most registers, most stack bytes) over the activations."""
    table = defaultdict(lambda: defaultdict(lambda: (0, 0)))
    architecture = function = None
    for line in demangle(cuobjdump("--dump-resource-usage")).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (.*):$", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            registers, stack = table[family(function)][architecture]
            table[family(function)][architecture] = (max(registers, int(match[1])), max(stack, int(match[2])))
    return table


def blocks_per_multiprocessor(registers, threads=256):
    """Blocks of 256 threads that 64 Ki registers and 2048 threads hold (sm_90); registers are given out by eights."""
    return min(2048 // threads, 65536 // (-(-registers // 8) * 8 * threads))


def rows():
    for kernel, by_architecture in sorted(resources().items()):
        registers = [by_architecture[architecture][0] for architecture in ARCHITECTURES]
        yield [*kernel, *map(str, registers), str(blocks_per_multiprocessor(registers[1]))]


def test_operators_are_registered_for_cuda():
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"convbn_ext::{name}", "CUDA"), name


def test_every_architecture_is_built():
    assert {*ARCHITECTURES, "compute_120"} <= set(build_info.CUDA_ARCHITECTURES)
    for kernel, by_architecture in resources().items():
        assert set(by_architecture) == set(ARCHITECTURES), kernel


def test_nothing_is_spilled():
    spilling = {
        (kernel, architecture): stack
        for kernel, by_architecture in resources().items()
        for architecture, (_, stack) in by_architecture.items()
        if stack
    }
    assert not spilling


def test_registers_are_those_of_the_table():
    """A change of registers is a change of occupancy: look at it, then write the table anew."""
    with TABLE.open() as file:
        assert list(csv.reader(file))[1:] == list(rows())


@functools.cache
def wide_accesses():
    """(family) → widest global load and store in the machine code for sm_90, in bits."""
    widest = defaultdict(lambda: [0, 0])
    kernel = None
    for line in demangle(cuobjdump("-sass", "-arch", "sm_90")).splitlines():
        if match := re.search(r"Function : (.*)", line):
            kernel = family(match[1])
        elif match := re.search(r"\b(LDG|STG)\.\S*?(?:\.(64|128))?[ .]", line):
            side, bits = match[1] == "STG", re.search(r"\.(64|128)\b", line)
            widest[kernel][side] = max(widest[kernel][side], int(bits[1]) if bits else 32)
    return widest


def test_packs_are_moved_128_bits_at_once():
    packed = {kernel: bits for kernel, bits in wide_accesses().items() if kernel[3] not in ("", "1")}
    assert len(packed) == 5 * 2 * 4  # kernels, layouts, dtypes
    for kernel, (load, store) in packed.items():
        assert load == 128, kernel
        if kernel[0] in ("bn_apply", "bn_backward_apply", "bn_invert"):
            assert store == 128, kernel


if __name__ == "__main__":
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["kernel", "layout", "scalar", "pack", *(f"registers {a}" for a in ARCHITECTURES), "blocks per SM, sm_90"]
    )
    writer.writerows(rows())
