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
OPERATORS = (
    *("bn_affine", "bn_parameter_gradients", "bn_move_running"),
    *("conv_bn_forward", "conv_bn_backward", "krylov_orthonormalize", "krylov_combine", "krylov_norms"),
    *("krylov_rotate", "krylov_solve", "gmres_cycle"),
)

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
# "void convbn::conv_gemm_kernel<convbn::TensorProduct<float, true>, convbn::NormGradient<float>, 4>(…)"
CONVOLUTION = re.compile(
    r"(?P<name>\w+)_kernel<(?:convbn::(?P<product>\w+)Product<[^>]*>, )?convbn::(?P<source>\w+)<(?P<scalar>\w+)>, "
    r"(?P<pack>\d+)>\("
)
PRODUCTS = {("conv_gemm", "Values"): "conv_gemm forward", ("conv_gemm", "NormGradient"): "conv_gemm grad_input"}


def family(signature):
    """(kernel, layout or product, scalar, pack)."""
    signature = signature.replace("(bool)1", "true").replace("(bool)0", "false").replace("(int)", "")
    match = CONVOLUTION.search(signature) or KERNEL.search(signature)
    assert match, signature
    scalar = (match["scalar"] or "").removeprefix("__").removeprefix("nv_")
    if match["name"] == "conv_combine_weight":
        return match["name"], "depthwise" if match["layout"] == "true" else "", scalar, ""
    if match.re is KERNEL:
        return match["name"], LAYOUTS[match["layout"]], scalar, match["pack"] or ""
    name = PRODUCTS.get((match["name"], match["source"]), match["name"])
    if name == "depthwise":
        name += " forward" if match["source"] == "Values" else " grad_input"
    return name, (match["product"] or "").lower(), scalar, match["pack"]


@functools.cache
def resources():
    """(family) → architecture → most (registers, stack bytes, static shared bytes) over the activations."""
    table = defaultdict(lambda: defaultdict(lambda: (0, 0, 0)))
    architecture = function = None
    for line in demangle(cuobjdump("--dump-resource-usage")).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (.*):$", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            row = table[family(function)]
            row[architecture] = tuple(map(max, row[architecture], map(int, match.groups())))
    return table


def dynamic_shared(kernel):
    """Bytes that the launch adds: the tiles of the products; moments or sums of half of the reductions' threads."""
    name, layout, _, pack = kernel
    if name.startswith("conv_gemm") or name in ("conv_grad_weight", "depthwise forward", "depthwise grad_input"):
        return 43008
    fields = {"bn_statistics": 3, "bn_backward_reduce": 2}.get(name, 0)
    return 128 * 8 * fields * int(pack) if layout == "NHWC" else 0


def blocks_per_multiprocessor(registers, shared, threads):
    """Blocks that 64 Ki registers (given out by eights), 227 KiB of shared memory and 2048 threads hold (sm_90)."""
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(2048 // threads, by_registers, 227 * 1024 // (shared + 1024))


def rows():
    for kernel, by_architecture in sorted(resources().items()):
        registers = [by_architecture[architecture][0] for architecture in ARCHITECTURES]
        shared = by_architecture["sm_90"][2] + dynamic_shared(kernel)
        threads = {
            "conv_statistics": 1024,
            "bn_finish_statistics": 128,
            "bn_finish_backward": 128,
            "conv_finish_sums": 128,
        }.get(kernel[0], 256)
        blocks = blocks_per_multiprocessor(registers[1], shared, threads)
        yield [*kernel, *map(str, registers), str(shared), str(blocks)]


def test_operators_are_registered_for_cuda():
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"convbn_ext::{name}", "CUDA"), name
    assert torch._C._dispatch_has_kernel_for_dispatch_key("convbn_ext::conv_bn_forward", "AutocastCUDA")


def test_every_architecture_is_built():
    assert {*ARCHITECTURES, "compute_120"} <= set(build_info.CUDA_ARCHITECTURES)
    for kernel, by_architecture in resources().items():
        assert set(by_architecture) == set(ARCHITECTURES), kernel


def test_nothing_is_spilled():
    spilling = {
        (kernel, architecture): stack
        for kernel, by_architecture in resources().items()
        for architecture, (_, stack, _) in by_architecture.items()
        if stack
    }
    assert not spilling


def test_shared_memory_needs_no_attribute():
    """Static and dynamic together; a GPU refuses the launch otherwise."""
    for kernel, by_architecture in resources().items():
        if kernel[0] != "gmres_cycle":  # asks for more
            for _, _, static in by_architecture.values():
                assert static - 1024 + dynamic_shared(kernel) <= 48 << 10, kernel  # 1 KB is the system's


def test_registers_are_those_of_the_table():
    """A change of registers is a change of occupancy: look at it, then write the table anew."""
    with TABLE.open() as file:
        assert list(csv.reader(file))[1:] == list(rows())


@functools.cache
def machine_code():
    """(family) → the instructions for sm_90 that move or multiply, over all activations."""
    instructions = defaultdict(set)
    kernel = None
    for line in demangle(cuobjdump("-sass", "-arch", "sm_90")).splitlines():
        if match := re.search(r"Function : (.*)", line):
            kernel = family(match[1])
        elif match := re.search(r"\b(LDG|STG|LDGSTS|LDSM|HMMA|FFMA)\b\S*", line):
            instructions[kernel].add(match[0])
    return instructions


def widest(kernel, operation):
    """Bits of the widest access of a kind: LDG, STG, LDGSTS (global memory straight to shared)."""
    found = [i for i in machine_code()[kernel] if i.split(".")[0] == operation]
    bits = [int(match[1]) if (match := re.search(r"\.(64|128)\b", i)) else 32 for i in found]
    return max(bits, default=0)


def packed(*names):
    kernels = [k for k in machine_code() if k[3] not in ("", "1") and k[0].split()[0] in names]
    assert kernels
    return kernels


def test_packs_are_moved_128_bits_at_once():
    elementwise = ("bn_apply", "bn_backward_apply", "bn_invert")
    kernels = packed(*elementwise, "bn_statistics", "bn_backward_reduce")
    assert len(kernels) == 5 * 2 * 4  # kernels, layouts, dtypes
    for kernel in kernels + packed("conv_gemm", "conv_grad_weight", "depthwise"):
        assert max(widest(kernel, "LDG"), widest(kernel, "LDGSTS")) == 128, kernel
        if kernel[0] not in ("bn_statistics", "bn_backward_reduce"):
            assert widest(kernel, "STG") == 128, kernel
    for kernel in packed("conv_gemm", "conv_grad_weight"):  # weights, x
        assert widest(kernel, "LDGSTS") == 128, kernel


HMMA = {"float": "HMMA.1688.F32.TF32", "half": "HMMA.16816.F32", "bfloat16": "HMMA.16816.F32.BF16"}


def test_products_use_tensor_cores():
    kernels = [k for k in machine_code() if k[0].startswith(("conv_gemm", "conv_grad_weight"))]
    assert len(kernels) == 3 * 4 * 2  # forward, grad_input, grad_weight; float, tf32, fp16, bf16; packs and scalars
    for kernel in kernels:
        name, product, scalar, _ = kernel
        instructions = machine_code()[kernel]
        multiplications = {i for i in instructions if i.startswith("HMMA")}
        assert multiplications == ({HMMA[scalar]} if product == "tensor" else set()), kernel
        if product == "float":
            assert any(i.startswith("FFMA") for i in instructions), kernel
        elif name != "conv_grad_weight" or scalar != "float":  # ldmatrix transposes 16-bit values alone
            assert any(i.startswith("LDSM") for i in instructions), kernel


if __name__ == "__main__":
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        [
            *("kernel", "layout or product", "scalar", "pack"),
            *(f"registers {a}" for a in ARCHITECTURES),
            *("shared bytes", "blocks per SM, sm_90"),
        ]
    )
    writer.writerows(rows())
