"""Spec S15 and S16: FFT, LU, least squares and the choice between methods."""

import pytest
import torch
from layers import MODES, random_bn, random_layer, trained_layer
from torch import nn

import convbn_ext as cb
from convbn_ext import _C, cache
from convbn_ext.border import BorderLayout, border_layout, factorise_border
from convbn_ext.direct import (
    FACTOR_BYTES,
    Factor,
    best_layouts,
    factorise,
    factorise_by_products,
    layouts,
    loss,
    make_factor,
)
from convbn_ext.errors import forward


def operator(shape, kernel, **options):
    conv, bn = random_layer(shape, shape[0], kernel, **options)
    return cb.ConvBNOperator(conv, bn, shape)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((3, 7, 6), 3, {"padding": 1}),
        ((2, 6, 9), (3, 5), {"padding": (1, 2), "padding_mode": "reflect"}),
        ((4, 9, 4), 3, {"padding": 2, "dilation": 2, "groups": 2, "padding_mode": "replicate"}),
        ((2, 7, 5), 2, {"padding": "same"}),
        ((2, 11), 3, {"padding": 1}),
        ((2, 4, 5, 3), 3, {"padding": 1}),
        ((2, 5, 5), 3, {"padding": 1, "padding_mode": "circular"}),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_layout_of_the_factor_is_the_inverse(shape, kernel, options, seed):
    """Blocks along any axis, with any number of rows, also where the last group is filled up."""
    op = operator(shape, kernel, seed=seed, **options)
    W = op.to_sparse().to_dense() / op.channel_vector(op.scale)[:, None]
    torch.manual_seed(0)
    v = torch.randn(3, op.shape[1], dtype=torch.float64)
    found = layouts(op)
    assert any(layout.groups == 1 for layout in found)
    assert (len(found) > 1) == (options.get("padding_mode") != "circular")
    factors = [make(op, layout) for layout in found for make in (factorise, factorise_by_products)]
    border = border_layout(op, FACTOR_BYTES)
    assert (border is None) == (options.get("padding_mode") == "circular")
    if border is not None:
        factors.append(factorise_border(op, border))
    for factor in factors:
        assert factor is not None
        for apply, matrix in ((factor.apply, W.T), (factor.apply_adjoint, W)):
            z = apply(v @ matrix)
            if seed == 2:  # seed 1 has a block that is almost singular, and rows are not exchanged between blocks
                torch.testing.assert_close(z, v, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(z + apply((v - z) @ matrix), v, rtol=1e-9, atol=1e-9)
        left = float((factor.apply(v) * v.flip(0)).sum())
        assert left == pytest.approx(float((v * factor.apply_adjoint(v.flip(0))).sum()), rel=1e-6, abs=1e-6)


def test_layouts_include_groups_that_need_filling():
    sizes = {(layout.axis, layout.rows, layout.groups) for layout in layouts(operator((3, 7, 6), 3, padding=1))}
    assert (0, 2, 4) in sizes  # 7 rows in groups of 2: one filler row
    assert (1, 4, 2) in sizes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 16, 16), (2, 30), (2, 5, 4, 6)])
def test_direct_solves_default_layers(shape, mode, dtype):
    conv, bn, z, x = trained_layer(shape, 6, dtype, padding_mode=mode)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    result = cb.solve(conv, bn, x, method="direct", rtol=rtol)
    assert result.converged, (result.status, result.residual)
    assert result.method == "direct"
    assert "LU" in result.reason
    table = cb.errors(z, result.z, x, conv, bn)
    assert table.error3[1] <= rtol
    op = cb.ConvBNOperator(conv, bn, shape)
    cond = float(torch.linalg.cond(op.to_sparse().to_dense().double()))
    rhs = x.double().flatten(1) - op.channel_vector(op.offset)
    assert table.error1[1] <= cond * table.error2[1] / rhs.norm() + torch.finfo(dtype).eps
    assert [len(h) for h in result.history] == [1 + i for i in result.iterations.tolist()]


@pytest.mark.parametrize(("shape", "batch", "steps"), [((3, 8, 8), 64, 4), ((3, 16, 16), 64, 5), ((2, 6, 6), 1, 41)])
def test_block_gmres_shares_one_space(shape, batch, steps):
    conv, bn, z, x = trained_layer(shape, batch)
    x[0, 0] = torch.nan if batch > 1 else x[0, 0]
    result = cb.solve(conv, bn, x, method="block_gmres", rtol=1e-8)
    assert result.status == ["nonfinite"] * (batch > 1) + ["converged"] * (batch - (batch > 1)), result.reason
    assert int(result.iterations.max()) <= steps
    good = slice(1, None) if batch > 1 else slice(None)
    assert (result.z[good] - z[good]).norm() <= 1e-4 * z.norm()


def test_direct_agrees_with_lapack_on_hard_data():
    conv, bn = random_layer((3, 12, 10), 3, 3, padding=1)
    x = torch.randn(4, 3, 12, 10, dtype=torch.float64)
    op = cb.ConvBNOperator(conv, bn, (3, 12, 10))
    exact = torch.linalg.solve(op.to_sparse().to_dense(), (x.flatten(1) - op.channel_vector(op.offset)).T).T
    result = cb.solve(conv, bn, x, method="direct", rtol=1e-10)
    assert result.converged, result.residual
    assert (result.z.flatten(1) - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_border_system_solves_what_blocks_of_rows_lose(mode):
    """3 × 64 × 64, cond 1e6: the blocks lose all digits, the border system none that cond does not force."""
    conv, bn, _, x = trained_layer((3, 64, 64), 2, seed=2, padding_mode=mode)
    op = cb.ConvBNOperator(conv, bn, (3, 64, 64))
    blocks = next(layout for layout in layouts(op) if layout.groups == 64)
    assert loss(op, factorise(op, blocks)) > 1
    assert isinstance(best_layouts(op, 2)[0], BorderLayout)
    factor = make_factor(op, blocks)  # takes the other kind by itself
    assert loss(op, factor.map) < 1e-8
    assert factor.note == "LU in 64 blocks of 192 was too inaccurate: Fourier blocks and a border system of order 756"
    for dtype in (torch.float64, torch.float32):
        rtol = 1e-12 if dtype == torch.float64 else 1e-6
        result = cb.solve(conv.to(dtype), bn.to(dtype), x.to(dtype), rtol=rtol)
        assert result.converged, (result.status, result.reason)
        assert int(result.iterations.max()) == 1
        assert "border system" in result.reason


def test_blocks_of_rows_serve_where_the_symbol_is_singular():
    """A blur: its circular version has a zero, so that M is no inverse; W with zero padding is regular."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    blur = torch.tensor([0.25, 0.5, 0.25])
    with torch.no_grad():
        conv.weight.copy_(blur[:, None] * blur)
    bn = random_bn(2, 1)
    op = cb.ConvBNOperator(conv, bn, (1, 8, 8))
    border = border_layout(op, FACTOR_BYTES)
    assert loss(op, factorise_border(op, border)) > 0.1
    factor = make_factor(op, border)
    assert "too inaccurate: " in factor.note
    assert loss(op, factor.map) < 1e-9
    x = forward(torch.randn(2, 1, 8, 8), conv, bn)
    assert cb.solve(conv, bn, x, method="direct", rtol=1e-12).converged


def test_a_border_system_beyond_the_limit_is_float32(monkeypatch):
    """As for 64 × 56 × 56, whose K of order 14080 takes 793 MB in float32."""
    conv, bn, z, x = trained_layer((3, 16, 16), 3)
    op = cb.ConvBNOperator(conv, bn, (3, 16, 16))
    assert border_layout(op, 180**2 * 8).dtype == torch.float64
    assert border_layout(op, 180**2 * 8 - 1).dtype == torch.float32
    assert border_layout(op, 180**2 * 4 - 1) is None
    monkeypatch.setattr("convbn_ext.direct.FACTOR_BYTES", 180**2 * 4)
    result = cb.solve(conv, bn, x, method="direct", rtol=1e-10)
    assert result.converged, (result.status, result.reason)
    assert int(result.iterations.max()) > 1
    assert (result.z - z).norm() <= 1e-6 * z.norm()
    big = cb.ConvBNOperator(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), (64, 56, 56))
    assert border_layout(big, FACTOR_BYTES) == BorderLayout(1, 14080, torch.float32)


def test_border_system_of_many_unknowns_is_factored_in_panels():
    conv, bn, _, x = trained_layer((24, 16, 16), 2)
    op = cb.ConvBNOperator(conv, bn, (24, 16, 16))
    border = border_layout(op, FACTOR_BYTES)
    assert border.size == 1440  # six panels
    factor = factorise_border(op, border)
    assert loss(op, factor) < 1e-9
    v, u = torch.randn(2, 3, op.shape[1], dtype=torch.float64)
    left, right = (factor.apply(v) * u).sum(), (v * factor.apply_adjoint(u)).sum()
    assert float((left - right).abs()) <= 1e-8 * float(factor.apply(v).norm() * u.norm())
    assert cb.solve(conv, bn, x, method="direct", rtol=1e-13).converged


def test_residuals_at_the_rounding_of_z_end_a_direct_solve():
    """cond 1e8 and data that no moderate z makes: ‖z‖ ~ 1e7 ‖x‖, so that a residual of 1e-11 ‖x‖ is out of reach."""
    conv, bn, _, x = trained_layer((3, 32, 32), 2, seed=3)
    result = cb.solve(conv, bn, torch.randn_like(x), method="direct", rtol=1e-11)
    assert result.status == ["stagnation"] * 2
    assert int(result.iterations.max()) < 20
    assert "its rounding in float64 alone exceeds the tolerance" in result.reason
    assert "instead" not in result.reason


def test_direct_goes_on_without_a_factor_that_is_of_no_use(monkeypatch):
    conv, bn, z, x = trained_layer((3, 8, 8), 2)
    monkeypatch.setattr("convbn_ext.run.cached_factor", lambda *_: Factor(_C.DiagonalMap(torch.randn(192))))
    result = cb.solve(conv, bn, x, method="direct", rtol=1e-9)
    assert result.converged, (result.status, result.reason)
    assert "the factor is of no use: block_gmres" in result.reason
    assert cb.errors(z, result.z, x, conv, bn).error3[1] <= 1e-9


def test_samples_do_not_see_each_other_in_direct():
    conv, bn, _, x = trained_layer((3, 12, 12), 5)
    x[1] = torch.randn(3, 12, 12)
    x[2, 0, 0, 0] = torch.nan
    result = cb.solve(conv, bn, x, method="direct", rtol=1e-10)
    assert result.status == ["converged", "converged", "nonfinite", "converged", "converged"]
    for i in (0, 1, 3, 4):
        alone = cb.solve(conv, bn, x[i : i + 1], method="direct", rtol=1e-10)
        torch.testing.assert_close(alone.z[0], result.z[i], rtol=1e-6, atol=1e-8)


def test_a_factor_serves_until_the_weight_changes(monkeypatch):
    made = []
    monkeypatch.setattr("convbn_ext.direct.make_factor", lambda *args: made.append(1) or make_factor(*args))
    cache.forget()
    conv, bn, z, x = trained_layer((3, 8, 8), 2, torch.float32)
    for _ in range(3):
        assert cb.solve(conv, bn, x, method="direct").converged
    assert len(made) == 1
    conv.weight.data.mul_(1.5)  # changes no version counter
    changed = cb.solve(conv, bn, bn(conv(z)).detach(), method="direct")
    assert changed.converged
    assert len(made) == 2
    assert (changed.z - z).norm() < 1e-2 * z.norm()


def test_a_singular_layer_is_never_returned_as_solved():
    conv, bn = random_layer((3, 6, 6), 3, 3, padding=1)
    with torch.no_grad():
        conv.weight[1] = 0  # channel 1 is constant, whatever z
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for method in ("auto", "direct", "gmres"):
        result = cb.solve(conv, bn, x, method=method)
        assert not set(result.status) & {"converged", "maxiter"}, (method, result.status)
        assert (result.residual > 1e-3).all()
    assert "the layer is singular to rounding" in cb.solve(conv, bn, x, method="direct").reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(3, 9, 8), (4, 15), (2, 4, 5, 6)])
def test_fft_is_exact_for_circular_padding(shape, dtype):
    conv, bn, z, x = trained_layer(shape, 3, dtype, padding_mode="circular", groups=2 if shape[0] == 4 else 1)
    result = cb.solve(conv, bn, x, rtol=1e-12 if dtype == torch.float64 else 1e-6)
    assert result.converged
    assert result.method == "fft"
    assert int(result.iterations.max()) <= 2
    assert (result.z - z).norm() <= (1e-10 if dtype == torch.float64 else 1e-3) * z.norm()


def test_circular_layer_with_a_zero_in_its_symbol_is_singular():
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[0.25, 0.5, 0.25]]]))
    bn = random_bn(1, 1)
    torch.manual_seed(0)
    wave = torch.tensor([1.0, -1.0]).repeat(8).double()
    x = forward(torch.randn(2, 1, 16), conv, bn)
    x[1] += 0.1 * wave  # what the layer cannot make
    result = cb.solve(conv, bn, x, rtol=1e-10)
    assert result.status == ["converged", "singular"]
    assert "singular values of the symbol" in result.reason


@pytest.mark.parametrize("preconditioner", ["circulant", "none"])
@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize(
    ("shape", "out", "kernel", "options"),
    [
        ((3, 8, 8), 3, 3, {"padding": 1, "stride": 2}),
        ((3, 9, 8), 2, 3, {"padding": 1}),
        ((2, 6, 6), 5, 3, {"padding": 1}),
        ((4, 8, 8), 2, 3, {"padding": 1, "groups": 2, "padding_mode": "reflect"}),
        ((4, 9), 2, 4, {"stride": 3, "padding": 2, "padding_mode": "circular", "dilation": 2}),
        ((2, 8, 8), 2, 3, {}),
        ((2, 6, 6), 2, 3, {"padding": 2}),
        ((1, 6, 6), 8, 2, {"stride": 2}),
        ((2, 3, 4, 4), 1, 2, {"stride": (1, 2, 2)}),
    ],
)
def test_least_squares_and_minimum_norm(shape, out, kernel, options, consistent, preconditioner):
    conv, bn = random_layer(shape, out, kernel, seed=2, **options)
    op = cb.ConvBNOperator(conv, bn, shape)
    A, (m, n) = op.to_sparse().to_dense(), op.shape
    x = forward(torch.randn(2, *shape), conv, bn)
    if not consistent:
        x = torch.randn_like(x)
    result = cb.solve(conv, bn, x, method="lsq", rtol=1e-9, preconditioner=preconditioner, input_shape=shape)
    expected = (torch.linalg.pinv(A) @ (x.flatten(1) - op.channel_vector(op.offset)).T).T
    assert (result.z.flatten(1) - expected).norm() <= 1e-6 * expected.norm()
    assert set(result.status) == {"converged" if consistent or m <= n else "inconsistent"}
    assert result.reason.startswith("least squares" if m > n else "minimum norm")


def test_minimum_norm_is_taken_from_the_start_vector():
    conv, bn = random_layer((2, 6, 6), 1, 3, padding=1)
    x, x0 = torch.randn(2, 1, 6, 6).double(), torch.randn(2, 2, 6, 6).double()
    result = cb.solve(conv, bn, x, x0=x0, rtol=1e-10)
    op = cb.ConvBNOperator(conv, bn, (2, 6, 6))
    A = op.to_sparse().to_dense()
    residual = x.flatten(1) - op.channel_vector(op.offset) - x0.flatten(1) @ A.T
    expected = x0.flatten(1) + residual @ torch.linalg.pinv(A).T
    torch.testing.assert_close(result.z.flatten(1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "out", "options", "batch", "method"),
    [
        ((3, 8, 8), 3, {"padding": 1}, 8, "direct"),
        ((3, 32, 32), 3, {"padding": 1}, 128, "direct"),
        ((3, 32, 32), 3, {"padding": 1, "padding_mode": "circular"}, 128, "fft"),
        ((64, 56, 56), 64, {"padding": 1}, 4, "direct"),  # a border system of 0.8 GB, where blocks take 17
        ((64, 96, 96), 64, {"padding": 1}, 4, "block_gmres"),
        ((64, 96, 96), 64, {"padding": 1}, 1, "gmres"),
        ((3, 8, 8), 3, {"padding": 1, "stride": 2}, 2, "lsq"),
        ((3, 8, 8), 5, {"padding": 1}, 2, "lsq"),
        ((8, 8, 8), 8, {}, 2, "lsq"),
    ],
)
def test_auto_chooses_by_cost_and_says_why(shape, out, options, batch, method):
    from convbn_ext.choice import choose

    op = cb.ConvBNOperator(nn.Conv2d(shape[0], out, 3, **options), nn.BatchNorm2d(out), shape)
    choice = choose(op, batch, "auto", "auto")
    assert choice.method == method
    assert choice.reason


BAD = [
    ({"method": "fft"}, {}, r"method fft needs circular padding, stride 1 and C_in = C_out"),
    ({"method": "direct", "preconditioner": "row"}, {}, "method direct takes no preconditioner, got 'row'"),
    (
        {"method": "gmres"},
        {"stride": 2},
        r"method gmres needs as many outputs as inputs, got \(3, 8, 8\) -> \(3, 4, 4\)",
    ),
    (
        {"method": "lsq", "preconditioner": "row"},
        {},
        "method lsq takes the preconditioners circulant and none, got 'row'",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "message"), BAD)
def test_methods_that_cannot_work_are_refused(arguments, options, message):
    conv, bn = random_layer((3, 8, 8), 3, 3, padding=1, **options)
    with pytest.raises(ValueError, match=message):
        cb.solve(conv, bn, forward(torch.zeros(1, 3, 8, 8), conv, bn), **arguments)
