"""The block-tridiagonal LU of csrc/cpu/block_lu_cpu.cpp: the solve of a whole layer in one call (spec S15)."""

import pytest
import torch
from layers import random_layer

import convbn_ext as cb
from convbn_ext.direct import factorise, layouts


def layer(shape, dtype=torch.float64, **options):
    """Operator, its cheapest factor and x of three panels, the last one not full."""
    conv, bn = random_layer(shape, shape[0], 3, padding=1, **options)
    op = cb.ConvBNOperator(conv.to(dtype), bn.to(dtype), shape)
    factor = factorise(op, min(layouts(op), key=lambda layout: layout.factor_flops))
    torch.manual_seed(3)
    return op, factor, torch.randn(131, op.shape[1], dtype=dtype)


def true_residuals(op, z, x):
    given = x.double()
    error = given - op.map.apply(z.double()) - op.channel_vector(op.offset)
    return error.norm(dim=1) / given.norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 9, 8), (2, 13), (2, 4, 5, 3)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_the_residual_is_that_of_the_rounded_z(shape, mode, dtype):
    if mode == "reflect" and min(shape[1:]) < 4:
        mode = "replicate"
    op, factor, x = layer(shape, dtype, padding_mode=mode)
    rtol = 1e-6 if dtype == torch.float64 else 1e-3  # random x of hard layers: rounding z to float32 costs some digits
    found = factor.solve(x, op.scale, op.offset, rtol, 0.0)
    assert found.all_met
    assert found.z.dtype == dtype
    rounding = (
        1e-15 * found.z.double().norm(dim=1) * op.row_maxima().max() * op.weight[0].numel() / x.double().norm(dim=1)
    )
    exact = true_residuals(op, found.z, x)
    assert ((found.residual - exact).abs() <= 1e-9 * exact + rounding).all()
    assert (found.residual <= rtol).all()
    last = found.history.gather(1, found.steps[:, None])[:, 0]
    torch.testing.assert_close(last, found.residual, rtol=0, atol=0)


def test_rows_do_not_depend_on_each_other_or_on_threads():
    op, factor, x = layer((3, 12, 10))
    x[5, 7], x[64, 0] = torch.nan, torch.inf
    together = factor.solve(x, op.scale, op.offset, 1e-10, 0.0)
    expected = torch.ones(131, dtype=torch.bool)
    expected[[5, 64]] = False
    assert together.met.tolist() == expected.tolist()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(factor.solve(x, op.scale, op.offset, 1e-10, 0.0).z[expected], together.z[expected])
        again = factorise(op, min(layouts(op), key=lambda layout: layout.factor_flops))
        for row in (0, 4, 63, 65, 130):
            alone = again.solve(x[row : row + 1], op.scale, op.offset, 1e-10, 0.0)
            assert torch.equal(alone.z[0], together.z[row])
            assert alone.residual[0] == together.residual[row]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_the_scale_of_x_does_not_matter(size):
    op, factor, x = layer((3, 8, 8), bias=False)
    zero = torch.zeros_like(op.offset)
    plain = factor.solve(x, op.scale, zero, 1e-9, 0.0)
    scaled = factor.solve(x * size, op.scale, zero, 1e-9, 0.0)
    assert scaled.all_met
    assert plain.all_met
    assert torch.equal(scaled.z / size, plain.z)


def test_what_is_solved_already_takes_no_step():
    op, factor, x = layer((3, 8, 8))
    x[1] = op.channel_vector(op.offset)  # z = 0
    x[2] *= 1e-3
    found = factor.solve(x[:3], op.scale, op.offset, 1e-9, float(x[2].norm()) + op.channel_vector(op.offset).norm())
    assert found.steps.tolist()[1:] == [0, 0]
    assert (found.z[1:] == 0).all()
    assert found.all_met


def test_large_blocks_are_inverted_by_lapack():
    conv, bn = random_layer((6, 10, 10), 6, 3, padding=1)
    op = cb.ConvBNOperator(conv, bn, (6, 10, 10))
    dense = next(layout for layout in layouts(op) if layout.groups == 1)
    assert dense.size > 512
    x = torch.randn(2, 600, dtype=torch.float64)
    found = factorise(op, dense).solve(x, op.scale, op.offset, 1e-9, 0.0)
    assert found.all_met
    assert (true_residuals(op, found.z, x) <= 1e-9).all()


@pytest.mark.parametrize("shape", [(3, 6, 6), (6, 10, 10)])
def test_a_singular_layer_has_no_factor(shape):
    conv, bn = random_layer(shape, shape[0], 3, padding=1)
    with torch.no_grad():
        conv.weight.zero_()
    op = cb.ConvBNOperator(conv, bn, shape)
    assert all(factorise(op, layout) is None for layout in layouts(op))


def test_no_rows_are_solved_at_once():
    op, factor, x = layer((3, 6, 5))
    found = factor.solve(x[:0], op.scale, op.offset, 1e-10, 0.0)
    assert found.all_met
    assert found.z.shape == (0, op.shape[1])
    assert factor.apply(x[:0]).shape == (0, op.shape[1])
