"""What the Krylov kernels ask of memory: sectors and bank passes against the ideal, passes over the basis."""

from collections import defaultdict

import harness
import pytest
import torch
from simulated_ops import SimulatedOps, simulated
from test_simt_gmres import layer, right_hand_sides
from test_simt_krylov import blocks, orthonormal_basis

from convbn_ext import _C

pytestmark = pytest.mark.skipif("instrumented" not in harness.BUILDS, reason="the instrumented build counts traffic")

DTYPES = [torch.float32, torch.float64]
# What stays in L1 while a block runs: chunks' partial sums, 8 bytes for 1024 entries of a vector, and the weights, of
# which the lanes of a warp want neighbouring output channels'.
SMALL = {"scratch": 1.25, "weight": 1.35}


def counted(run):
    """(kernel, region, space, mode) → [moved, ideal] of what ``run(simulator)`` launches."""
    sim = harness.simulator("instrumented")
    sim.schedule("ascending")
    sim.traffic()
    run(sim)
    table = defaultdict(lambda: [0, 0])
    for row in sim.traffic():
        name = row.kernel.split("<")[0].strip("(")
        table[name, row.region, row.space, row.mode][0] += row.moved
        table[name, row.region, row.space, row.mode][1] += row.ideal
    return table


def check(table, title, capsys):
    """Everything within 1.10 of the ideal but for the SMALL; the table is printed."""
    lines = []
    for (kernel, region, space, mode), (moved, ideal) in sorted(table.items()):
        lines.append(f"{kernel:28} {region:12} {space:6} {mode:5} {moved:7} {ideal:7} {moved / ideal:5.2f}")
        assert moved <= SMALL.get(region, 1.10) * ideal, lines[-1]
    with capsys.disabled():
        print(f"\n{title}: sectors or bank passes, ideal, ratio")
        print("\n".join(lines))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verbs(dtype, capsys):
    n, k, rows = 2048, 12, torch.tensor([2, 0])
    V = blocks(1.01 * orthonormal_basis(n, k, dtype), k + 1)  # not quite orthonormal: no coefficient is exactly zero

    def run(sim):
        ops = SimulatedOps(sim)
        ops.krylov_orthonormalize(V, rows, k, right_hand_sides(n, 2, dtype))
        ops.krylov_combine(V, rows, torch.ones(2, k, dtype=torch.complex128))
        ops.krylov_norms(right_hand_sides(n, 2, dtype))

    table = counted(run)
    check(table, f"verbs, {dtype}, {k} vectors", capsys)
    # V0 holds 4 of the vectors: read by two projections and two updates; the second projection follows the first update
    # chunk by chunk, out of the cache
    assert table["krylov_project_kernel", "V0", "global", "read"][0] * 32 == 4 * 4 * 2 * n * dtype.itemsize
    assert table["krylov_combine_kernel", "V0", "global", "read"][0] * 32 == 4 * 2 * n * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared_bytes", [10 << 10, 64 << 10], ids=["global", "shared"])
def test_cycle(dtype, shared_bytes, capsys):
    op = layer((3, 8, 8), kernel_size=3, padding=1)

    def run(sim):
        with simulated(sim, cycle=True, shared_bytes=shared_bytes):
            _C.device_gmres(op.map, right_hand_sides(192, 1, dtype), maxiter=12, rtol=0.0)

    table = counted(run)
    check(table, f"cycle of 12 steps, {dtype}, {shared_bytes >> 10} KiB shared", capsys)
    in_shared = ("gmres_cycle_kernel", "far", "global", "read") not in table
    assert in_shared == (shared_bytes == 64 << 10)
