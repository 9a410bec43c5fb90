"""The host's mma.sync, ldmatrix and cp.async: random products, and where every element of every lane goes."""

import harness
import pytest
import torch

NAN = float("nan")
KINDS = {"mma_tf32": (torch.float32, 8), "mma_bf16": (torch.bfloat16, 16), "mma_fp16": (torch.float16, 16)}


def product(sim, kind, a, b, c):
    out = sim.output("C", c.clone())
    sim.run(kind, sim.input("A", a), sim.input("B", b), out, a.shape[0])
    assert not sim.reports()
    return out.read()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", harness.ORDERS)
def test_random_products(sim, kind, order):
    sim.schedule(order)
    dtype, depth = KINDS[kind]
    a, b, c = torch.randn(5, 16, depth).to(dtype), torch.randn(5, depth, 8).to(dtype), torch.randn(5, 16, 8)
    exact = a.double() @ b.double() + c.double()
    # tf32: the operands' last 13 bits are ignored, which is at most 2⁻¹⁰ of each
    size = a.double().abs() @ b.double().abs() + c.double().abs()
    limit = size * (2 * 2**-10 + 1e-6 if kind == "mma_tf32" else 1e-6)
    assert ((product(sim, kind, a, b, c).double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_of_a_and_b_is_where_the_manual_says(sim, kind):
    """A with a single one at (i, k) picks row k of B for row i of C: 16·K products, one for each element."""
    dtype, depth = KINDS[kind]
    a = torch.eye(16 * depth).view(16 * depth, 16, depth)
    b = torch.arange(depth * 8.0).view(1, depth, 8).expand(16 * depth, depth, 8)
    c = product(sim, kind, a.to(dtype), b.to(dtype), torch.zeros(16 * depth, 16, 8))
    assert torch.equal(c, a @ b)


def test_tf32_ignores_the_low_bits_and_rounding_is_to_nearest(sim):
    a, b = torch.zeros(1, 16, 8), torch.zeros(1, 8, 8)
    a[0, 0, 0], b[0, 0, 0] = 1 + 2**-10 + 2**-11, 1
    assert product(sim, "mma_tf32", a, b, torch.zeros(1, 16, 8))[0, 0, 0] == 1 + 2**-10
    values = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, float("inf"), 0.0, 3e38] + [1.0] * 26)
    out = sim.output("out", torch.full((32,), NAN))
    sim.run("round_tf32", sim.input("in", values), out)
    expected = values.clone()
    expected[:3] = torch.tensor([1 + 2**-10, 1, -1 - 2**-10])  # ties away from zero
    rounded = out.read()
    assert torch.equal(rounded[:5], expected[:5])
    assert abs(rounded[5] / 3e38 - 1) <= 2**-11


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", harness.ORDERS)
def test_ldmatrix(sim, transposed, order):
    sim.schedule(order)
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = sim.output("out", torch.full((32, 4, 2), -1, dtype=torch.int16))
    sim.run("ldmatrix", sim.input("in", matrices), out, int(transposed))
    assert not sim.reports()
    words = out.read()
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(4):
            expected = matrices[i, 2 * t : 2 * t + 2, g] if transposed else matrices[i, g, 2 * t : 2 * t + 2]
            assert torch.equal(words[lane, i], expected), (lane, i)
    for row in sim.traffic():
        if row.space == "shared":
            assert row.moved == row.ideal


@pytest.mark.parametrize("valid", [64, 40, 0])
@pytest.mark.parametrize("order", harness.ORDERS)
def test_cp_async(sim, order, valid):
    sim.schedule(order)
    chunks = torch.randn(64, 4)
    out = sim.output("out", torch.full((64, 4), NAN))
    sim.run("cp_async", sim.input("in", chunks), out, valid)
    assert not sim.reports()
    swapped = chunks.clone()
    swapped[valid:] = 0
    swapped = swapped.view(32, 2, 4).flip(1).view(64, 4)
    assert torch.equal(out.read(), swapped.flip(0))
