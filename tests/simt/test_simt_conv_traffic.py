"""What the convolution kernels ask of memory: sectors and bank passes against the ideal, full-tensor passes."""

import functools
from collections import defaultdict

import harness
import pytest
from test_simt_bn import Case, run_everything
from test_simt_conv import PRODUCTS, Layer, products

pytestmark = pytest.mark.skipif("instrumented" not in harness.BUILDS, reason="the instrumented build counts traffic")


@functools.cache
def run_layer(product, groups=1):
    """Forward and backward of one layer whose pixels and channels fill the tiles."""
    sim = harness.simulator("instrumented")
    sim.schedule("ascending")
    sim.traffic(), sim.footprints()
    layer = Layer(sim, product, (2, 64, 8, 8), 64, kernel=(3, 1), padding=(1, 0), groups=groups)
    return layer.forward().gradients()


def kernel_name(name):
    """`(conv_gemm_kernel<P, Source, V>)` → conv_gemm."""
    return name.split("<")[0].strip("(").removesuffix("_kernel")


@products
@pytest.mark.parametrize("groups", [1, 64], ids=["dense", "depthwise"])
def test_sectors_and_banks_are_near_the_ideal(product, groups, capsys):
    """≤ 1.10 everywhere, shared memory and parameters per channel included; the table is printed.

    Halves read the table of parameters, 8 floats a thread, in two loads of 16 bytes: each sector twice, the second
    time out of L1, since a launch touches no more sectors than the table has.
    """
    lines, over = [], []
    halves = PRODUCTS[product][0].itemsize == 2
    for launcher, rows in run_layer(product, groups).traffic.items():
        total = defaultdict(lambda: [0, 0])
        for row in rows:
            key = kernel_name(row.kernel), row.region, row.space, row.mode
            total[key][0] += row.moved
            total[key][1] += row.ideal
        for (kernel, region, space, mode), (moved, ideal) in total.items():
            what = f"{launcher:17} {kernel:21} {region:8} {space:6} {mode:5}"
            lines.append(f"{what} {moved:7} {ideal:7} {moved / ideal:5.2f}")
            allowed = 2.0 if halves and region == "table" and mode == "read" else 1.10
            if moved > allowed * ideal:
                over.append(lines[-1])
    with capsys.disabled():
        print(f"\n{product} {'depthwise' if groups > 1 else 'dense'}: sectors or bank passes, ideal, ratio")
        print("\n".join(lines))
    assert not over, over
    for launcher, footprints in run_layer(product, groups).footprints.items():
        touched = [n for (_, region, mode), n in footprints.items() if region == "table" and mode == "read"]
        assert all(n <= 6 * 64 * 4 // 32 for n in touched), launcher


@products
def test_passes_over_tensors_of_the_size_of_y(product, capsys):
    """Every read and write of y, grad and out by a layer's kernels, a sector once per launch: forward 3, backward 4."""
    layer = run_layer(product)
    sim = harness.simulator("instrumented")
    case = Case(sim, layer.y, True, layer.activation)
    sim.footprints()
    apply = run_everything(case)[2]["bn_apply"]
    forward = [*layer.footprints["conv_forward"].items(), *apply.items()]
    backward = [*layer.footprints["conv_grad_weight"].items(), *layer.footprints["conv_grad_input"].items()]
    sectors = layer.y.numel() * layer.y.element_size() / 32

    def passes(footprints, *buffers):
        return {key: n / sectors for key, n in footprints if key[1] in buffers}

    table = {
        "forward": passes(forward, "y", "out_"),
        "backward": passes(backward, "y", "grad"),
        "x and dx, as large here": passes(forward + backward, "x", "dx"),
    }
    with capsys.disabled():
        for name, rows in table.items():
            each = ", ".join(f"{kernel_name(k)} {b} {m} {n:g}" for (k, b, m), n in rows.items())
            print(f"\n{product}, {name}: {each}")
    assert table["forward"] == dict.fromkeys(table["forward"], 1)
    assert len(table["forward"]) == 3  # y written, y read, out written
    assert table["backward"] == dict.fromkeys(table["backward"], 1)
    assert len(table["backward"]) == 4  # y and grad with the weight's gradient, y and grad with the input's
    assert sum(table["x and dx, as large here"].values()) == 3  # x read twice, dx written
