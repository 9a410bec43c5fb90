"""What the convolution kernels ask of memory: sectors and bank passes against the ideal, full-tensor passes."""

import functools
from collections import defaultdict

import harness
import pytest
from test_simt_bn import Case, run_everything
from test_simt_conv import Layer, products

pytestmark = pytest.mark.skipif("instrumented" not in harness.BUILDS, reason="the instrumented build counts traffic")


TENSORS = ("x", "y", "grad", "out", "dx")


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
    """≤ 1.10 for every tensor and shared memory; the table, parameters per channel included, is printed."""
    lines, over = [], []
    for launcher, rows in run_layer(product, groups).traffic.items():
        total = defaultdict(lambda: [0, 0])
        for row in rows:
            key = kernel_name(row.kernel), row.region, row.space, row.mode
            total[key][0] += row.moved
            total[key][1] += row.ideal
        for (kernel, region, space, mode), (moved, ideal) in total.items():
            what = f"{launcher:17} {kernel:21} {region:8} {space:6} {mode:5}"
            lines.append(f"{what} {moved:7} {ideal:7} {moved / ideal:5.2f}")
            if moved > 1.10 * ideal and (region in TENSORS or space == "shared"):
                over.append(lines[-1])
    with capsys.disabled():
        print(f"\n{product} {'depthwise' if groups > 1 else 'dense'}: sectors or bank passes, ideal, ratio")
        print("\n".join(lines))
    assert not over, over


@products
def test_passes_over_tensors_of_the_size_of_y(product):
    """Beside what a convolution alone has to do (write y; read dy twice): forward 2 ≤ 3, backward 4 ≤ 5."""
    layer = run_layer(product)
    sim = harness.simulator("instrumented")
    case = Case(sim, layer.y, True, layer.activation)
    sim.footprints()
    run_everything(case)
    around = defaultdict(int)
    for (kernel, buffer, _), sectors in sim.footprints().items():
        around[kernel_name(kernel), buffer] += sectors
    size = layer.y.numel() * layer.y.element_size() / 32  # sectors

    def count(launcher, *buffers):
        return sum(n for (_, buffer, _), n in layer.footprints[launcher].items() if buffer in buffers) / size

    forward = count("conv_forward", "y") + (around["bn_apply", "y"] + around["bn_apply", "out_"]) / size
    reduce = (around["bn_backward_reduce", "y"] + around["bn_backward_reduce", "grad"]) / size
    products = count("conv_grad_input", "y", "grad") + count("conv_grad_weight", "y", "grad")
    assert (forward, reduce, products) == (3, 2, 4)
    assert forward - 1 <= 3
    assert reduce + products - 2 <= 5
