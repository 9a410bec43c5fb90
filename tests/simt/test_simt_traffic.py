"""What the batch normalisation kernels ask of memory: sectors and bank passes against the ideal, full-tensor passes."""

from collections import defaultdict

import harness
import pytest
import torch
from test_simt_bn import Case, run_everything, tensors

pytestmark = pytest.mark.skipif("instrumented" not in harness.BUILDS, reason="the instrumented build counts traffic")

TENSORS = ("y", "grad", "residual", "out_", "grad_y", "grad_residual")
PARAMETERS = ("mean", "scale", "bias", "a", "b", "c")  # per channel, float64
FORWARD, BACKWARD = ("bn_statistics", "bn_apply"), ("bn_backward_reduce", "bn_backward_apply")


def traffic_and_footprints(shape, dtype, channels_last):
    sim = harness.simulator("instrumented")
    sim.schedule("ascending")
    sim.traffic(), sim.footprints()
    return run_everything(Case(sim, tensors(shape, dtype), channels_last, "relu"))[1:]


def traffic_of(shape, dtype, channels_last):
    return traffic_and_footprints(shape, dtype, channels_last)[0]


def passes(traffic, kernels, tensor_bytes):
    """Full-tensor passes: 32-byte sectors moved to and from the tensors, over the sectors of one tensor."""
    sectors = sum(row.moved for kernel in kernels for row in traffic[kernel] if row.region in TENSORS)
    return sectors * 32 / tensor_bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_three_passes_forward_and_five_backward(dtype, channels_last):
    shape = (3, 64, 8, 8)
    traffic = traffic_of(shape, dtype, channels_last)
    size = 3 * 64 * 8 * 8 * dtype.itemsize
    assert passes(traffic, FORWARD, size) == 3  # y; y, out
    assert passes(traffic, BACKWARD, size) == 5  # y, grad; y, grad, grad_y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
def test_sectors_and_banks_are_near_the_ideal(dtype, channels_last, capsys):
    """On tile-aligned shapes ≤ 1.10; the float32 table of every kernel and region is printed.

    A thread of channels_last writes its partial sums, a thousandth of the traffic of a large tensor, one by one.
    """
    traffic, footprints = traffic_and_footprints((3, 64, 8, 8), dtype, channels_last)
    touched = {key: sectors for found in footprints.values() for key, sectors in found.items() if key[1] in PARAMETERS}
    assert touched
    assert set(touched.values()) == {64 * 8 // 32}
    lines = []
    for rows in traffic.values():
        total = defaultdict(lambda: [0, 0])
        for row in rows:
            key = (row.kernel.split("<")[0].strip("("), row.region, row.space, row.mode)
            total[key][0] += row.moved
            total[key][1] += row.ideal
        for (kernel, region, space, mode), (moved, ideal) in total.items():
            lines.append(f"{kernel:28} {region:12} {space:6} {mode:5} {moved:7} {ideal:7} {moved / ideal:5.2f}")
            allowed = 4.0 if channels_last and region == "scratch" else 1.10
            assert moved <= allowed * ideal, lines[-1]
    if dtype != torch.float32:
        return
    with capsys.disabled():
        print(f"\n{'NHWC' if channels_last else 'NCHW'} {dtype}: sectors or bank passes, ideal, ratio")
        print("\n".join(lines))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_channels_still_move_in_packs(dtype):
    """C = 3 and 37: rows side by side make whole packs, so channels_last reads each sector about once."""
    for channels in (3, 37):
        shape = (2, channels, 15, 17)
        size = 2 * channels * 15 * 17 * dtype.itemsize
        assert passes(traffic_of(shape, dtype, True), FORWARD, size) <= 3.3
