"""Spec S9, S11, S13: the operator against its explicit matrix, torch's own layers and the adjoint identity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import MODES, random_bn, random_layer
from torch import nn

import convbn_ext as cb
from convbn_ext import _C
from convbn_ext.errors import forward


def dot(a, b):
    return float((a * b).sum())


# shape, C_out, kernel, options: each row for one thing that can go wrong
CASES = [
    ((3, 8, 8), 3, 3, {"padding": 1}),  # the layer of the experiment
    ((3, 6, 7), 3, 3, {"padding": 1, "bias": False}),
    (
        (4, 6, 7),
        6,
        (3, 4),
        {"stride": (2, 1), "padding": (2, 3), "dilation": (1, 2), "groups": 2},
    ),  # everything at once
    ((4, 5, 5), 4, 3, {"padding": 1, "groups": 4}),  # depthwise
    ((2, 7, 5), 3, 2, {"padding": "same"}),  # even kernel: asymmetric padding
    ((2, 7, 5), 3, (2, 3), {"padding": "same", "dilation": 2}),
    ((2, 7, 5), 3, 3, {"padding": "valid"}),
    ((2, 6, 6), 2, 5, {"padding": 4}),  # the output is larger than the input
    ((2, 4, 4), 2, 3, {"padding": 3}),  # padding as wide as reflect allows
    ((2, 7, 7), 2, 1, {"stride": 3}),  # pixels that no window reads
    ((2, 9), 2, 4, {"padding": "same", "dilation": 2}),
    ((1, 12), 3, 5, {"padding": 2, "stride": 2}),
    ((2, 4, 3, 5), 2, (3, 1, 3), {"padding": (1, 0, 1)}),
    ((2, 5, 4, 4), 4, 3, {"padding": 1, "stride": (1, 2, 2), "groups": 2}),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "out", "kernel", "options"), CASES)
def test_operator_is_the_layer_its_matrix_and_its_adjoint(shape, out, kernel, options, mode):
    conv, bn = random_layer(shape, out, kernel, padding_mode=mode, **options)
    op = cb.ConvBNOperator(conv, bn, shape)
    z = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        x = bn(conv(z))
    assert op.input_shape == shape
    assert op.output_shape == tuple(x.shape[1:])
    offset = op.channel_vector(op.offset).reshape(op.output_shape)
    torch.testing.assert_close(op.matvec(z) + offset, x, rtol=1e-13, atol=1e-13)

    matrix = op.to_sparse().to_dense()
    assert matrix.shape == op.shape
    torch.testing.assert_close(op.matvec(z.flatten(1)), z.flatten(1) @ matrix.T, rtol=1e-13, atol=1e-13)
    u = torch.randn_like(x)
    torch.testing.assert_close(op.rmatvec(u).flatten(1), u.flatten(1) @ matrix, rtol=1e-13, atol=1e-13)
    assert dot(op.matvec(z), u) == pytest.approx(dot(z, op.rmatvec(u)), rel=1e-11, abs=1e-11)
    torch.testing.assert_close(op.row_maxima(), matrix.abs().amax(1), rtol=1e-14, atol=0)


@st.composite
def random_layers(draw):
    """Any layer that torch accepts, up to three axes, with an input that it fits."""
    axes = draw(st.integers(1, 3))
    size = st.integers(1, [9, 6, 4][axes - 1])
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    mode = draw(st.sampled_from(MODES))
    spatial, padding = [], []
    for k, d in zip(kernel, dilation, strict=True):
        n = draw(size)
        limit = {"zeros": 3, "circular": n, "replicate": 3, "reflect": n - 1}[mode]
        p = draw(st.integers(0, min(3, limit)))
        spatial.append(max(n, d * (k - 1) + 1 - 2 * p))
        padding.append(p)
    groups = draw(st.integers(1, 2))
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    options = {
        "stride": stride,
        "padding": tuple(padding),
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
    }
    return (c_in, *spatial), c_out, kernel, options


@settings(max_examples=60, deadline=None)
@given(random_layers(), st.integers(0, 2**31))
def test_any_layer_has_matrix_and_adjoint(case, seed):
    shape, out, kernel, options = case
    conv, bn = random_layer(shape, out, kernel, seed=seed, **options)
    op = cb.ConvBNOperator(conv, bn, shape)
    z = torch.randn(2, *shape, dtype=torch.float64)
    u = torch.randn(2, *op.output_shape, dtype=torch.float64)
    with torch.no_grad():
        offset = op.channel_vector(op.offset).reshape(op.output_shape)
        torch.testing.assert_close(op.matvec(z) + offset, bn(conv(z)), rtol=1e-12, atol=1e-12)
    scale = float(op.matvec(z).norm() * u.norm()) + 1
    assert dot(op.matvec(z), u) == pytest.approx(dot(z, op.rmatvec(u)), abs=1e-13 * scale)
    matrix = op.to_sparse().to_dense()
    torch.testing.assert_close(z.flatten(1) @ matrix.T, op.matvec(z.flatten(1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op.row_maxima(), matrix.abs().amax(1), rtol=1e-13, atol=0)


def test_linear_layer():
    torch.manual_seed(0)
    fc, bn = nn.Linear(5, 4).double(), random_bn(0, 4)
    op, z = cb.ConvBNOperator(fc, bn, (5,)), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(op.matvec(z) + op.offset, bn(fc(z)).detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(op.to_sparse().to_dense(), (op.scale[:, None] * fc.weight).detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("options", [{"affine": False}, {"affine": True}])
def test_given_statistics_and_missing_affine(options):
    conv, _ = random_layer((3, 6, 6), 3, 3, padding=1)
    bn = nn.BatchNorm2d(3, track_running_stats=False, **options).double().eval()
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    op = cb.ConvBNOperator(conv, bn, (7, 3, 6, 6), stats=(mean, var))
    z = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = nn.functional.batch_norm(conv(z), mean.double(), var.double(), bn.weight, bn.bias, eps=bn.eps).detach()
    offset = op.channel_vector(op.offset).reshape(op.output_shape)
    torch.testing.assert_close(op.matvec(z) + offset, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(forward(z, conv, bn, stats=(mean, var)), expected, rtol=1e-13, atol=1e-13)


def test_vector_forms_and_dtypes():
    conv, bn = random_layer((3, 4, 5), 2, 3, padding=1)
    op = cb.ConvBNOperator(conv.float(), bn, (3, 4, 5))
    z = torch.randn(2, 3, 4, 5)
    expected = op.matvec(z)
    assert expected.shape == (2, 2, 4, 5)
    assert expected.dtype == op.dtype == torch.float32
    for form in (z[0], z[0].flatten(), z.flatten(1)):
        torch.testing.assert_close(op.matvec(form).flatten(), expected[: len(form.reshape(-1, 60))].flatten())
    assert op.matvec(z.double()).dtype == torch.float64
    with pytest.raises(
        ValueError, match=r"matvec: expected shape \(60,\), \(B, 60\), \(3, 4, 5\) or \(B, 3, 4, 5\), got"
    ):
        op.matvec(torch.randn(2, 5, 4, 3))


def test_to_scipy_is_the_matrix_and_its_adjoint():
    conv, bn = random_layer((2, 4, 4), 2, 3, padding=1)
    op = cb.ConvBNOperator(conv, bn, (2, 4, 4))
    A, matrix = op.to_scipy(), op.to_sparse().to_dense().numpy()
    v = np.random.default_rng(0).standard_normal((32, 3))
    np.testing.assert_allclose(A @ v, matrix @ v, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(A.H @ v, matrix.T @ v, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(A.H @ v[:, 0], matrix.T @ v[:, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["gmres", "lgmres", "gcrotmk", "bicgstab", "qmr", "lsqr", "lsmr", "ours"])
def test_to_scipy_works_inside_scipys_solvers_and_ours(name):
    """Products with A alone, and with A and its adjoint (qmr, lsqr, lsmr)."""
    from scipy.sparse import linalg

    conv, bn = random_layer((2, 4, 4), 2, 3, padding=1)
    with torch.no_grad():  # near the identity, so that the short recurrences converge as well
        nn.init.dirac_(conv.weight)
        conv.weight.add_(0.1 * torch.randn_like(conv.weight))
        bn.weight.fill_(1)
    op = cb.ConvBNOperator(conv, bn, (2, 4, 4))
    z = np.random.default_rng(0).standard_normal(32)
    b = op.to_sparse().to_dense().numpy() @ z
    if name in ("lsqr", "lsmr"):
        found = getattr(linalg, name)(op.to_scipy(), b, atol=1e-13, btol=1e-13)[0]
    else:
        solver = cb.gmres if name == "ours" else getattr(linalg, name)
        options = {"restart": 32} if solver in (cb.gmres, linalg.gmres) else {}
        found, info = solver(op.to_scipy(), b, rtol=1e-12, **options)
        assert info == 0
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("out", "stride"), [(1, 1), (2, 2), (5, 1)])
def test_scipys_least_squares_solvers_find_what_solve_finds(out, stride):
    """Minimum norm and least squares by LSMR on the same operator, and by LAPACK on the matrix."""
    from scipy.sparse.linalg import lsmr

    conv, bn = random_layer((2, 6, 6), out, 3, padding=1, stride=stride)
    op = cb.ConvBNOperator(conv, bn, (2, 6, 6))
    x = torch.randn(2, *op.output_shape, dtype=torch.float64)
    result = cb.solve(conv, bn, x, method="lsq", rtol=1e-10, input_shape=(2, 6, 6))
    rhs = (x.flatten(1) - op.channel_vector(op.offset)).numpy()
    for z, b in zip(result.z.flatten(1).numpy(), rhs, strict=True):
        by_lsmr = lsmr(op.to_scipy(), b, atol=1e-14, btol=1e-14, maxiter=5000)[0]
        by_lapack = np.linalg.lstsq(op.to_sparse().to_dense().numpy(), b, rcond=None)[0]
        for expected in (by_lsmr, by_lapack):
            assert np.linalg.norm(z - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(3, 5, 6), (4, 7), (2, 3, 4, 5)])
def test_symbol_of_a_circular_layer_holds_its_singular_values(shape):
    axes = len(shape) - 1
    conv, bn = random_layer(
        shape, shape[0], 3, padding=1, padding_mode="circular", groups=2 if shape[0] % 2 == 0 else 1
    )
    op = cb.ConvBNOperator(conv, bn, shape)
    matrix = op.to_sparse().to_dense()
    assert op.symbol_cond() == pytest.approx(float(torch.linalg.cond(matrix)), rel=1e-9)
    # the stencil's blocks at frequency zero are the sums over the taps
    taps_summed = (conv.weight.detach() * op.scale.reshape(-1, *[1] * (axes + 1))).flatten(2).sum(2)
    torch.testing.assert_close(op.symbol()[0].real.reshape(taps_summed.shape), taps_summed, rtol=1e-12, atol=1e-13)


def test_symbol_needs_stride_one():
    conv, bn = random_layer((3, 6, 6), 3, 3, padding=1, stride=2)
    with pytest.raises(ValueError, match=r"needs stride 1 and equal spatial sizes, got stride \(2, 2\)"):
        cb.ConvBNOperator(conv, bn, (3, 6, 6)).symbol_cond()


def test_channels_without_gamma_are_named():
    conv, bn = random_layer((3, 5, 5), 4, 3, padding=1)
    with torch.no_grad():
        bn.weight[1] = bn.weight[3] = 0
        bn.weight[2] = -2
        bn.running_var[0] = 0
    op = cb.ConvBNOperator(conv, bn, (3, 5, 5))
    assert op.singular_channels == [1, 3]
    assert op.scale[2] < 0
    assert float(op.scale[0]) == pytest.approx(bn.weight[0].item() / math.sqrt(bn.eps), rel=1e-12)


def bad_operator(conv=None, bn=None, shape=(3, 6, 6), **options):
    good_conv, good_bn = random_layer((3, 6, 6), 3, 3, padding=1)
    return cb.ConvBNOperator(conv or good_conv, bn or good_bn, shape, **options)


BAD = [
    (
        lambda: bad_operator(conv=nn.ConvTranspose2d(3, 3, 3)),
        TypeError,
        "conv must be nn.Conv1d, .* got ConvTranspose2d",
    ),
    (lambda: bad_operator(bn=nn.LayerNorm(3)), TypeError, "bn must be nn.BatchNorm1d, .* got LayerNorm"),
    (lambda: bad_operator(bn=random_bn(2, 4)), ValueError, "bn has 4 features, but conv has 3 output channels"),
    (lambda: bad_operator(shape=(4, 6, 6)), ValueError, r"input_shape must be \(3, S1, S2\) .* got \(4, 6, 6\)"),
    (lambda: bad_operator(shape=(6, 6)), ValueError, r"input_shape must be \(3, S1, S2\)"),
    (lambda: bad_operator(conv=nn.Conv2d(3, 3, 7)), ValueError, "smaller than the kernel"),
    (lambda: bad_operator(bn=nn.BatchNorm2d(3, track_running_stats=False)), ValueError, "bn has no running statistics"),
    (lambda: bad_operator(stats="batches"), TypeError, 'stats must be "running", "batch" or a pair'),
    (
        lambda: bad_operator(stats=(torch.zeros(2), torch.ones(3))),
        ValueError,
        r"stats mean must have shape \(3,\), got \(2,\)",
    ),
    (
        lambda: bad_operator(stats=(torch.zeros(3), -torch.ones(3))),
        ValueError,
        r"var is negative in channels \[0, 1, 2\]",
    ),
    (
        lambda: bad_operator(stats=(torch.tensor([0, torch.nan, 0]), torch.ones(3))),
        ValueError,
        r"not finite in channels \[1\]",
    ),
    (
        lambda: bad_operator(conv=nn.Conv2d(3, 3, 5, padding=2, padding_mode="reflect"), shape=(3, 2, 6)),
        ValueError,
        r"reflect padding \(2, 2\) along spatial axis 0 needs an input of at least 3, got 2",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_errors_in_three_norms():
    conv, bn = random_layer((3, 6, 6), 3, 3, padding=1)
    z_true = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    x = forward(z_true, conv, bn)
    torch.testing.assert_close(x, bn(conv(z_true)).detach(), rtol=1e-13, atol=1e-13)
    z = z_true + 0.1
    table = cb.errors(z_true, z, x, conv, bn)
    d, r = (z - z_true).flatten(), (forward(z, conv, bn) - x).flatten()
    for i, p in enumerate((1, 2, float("inf"))):
        assert table.error1[i] == pytest.approx(float(d.norm(p) / z_true.flatten().norm(p)), rel=1e-12)
        assert table.error2[i] == pytest.approx(float(r.norm(p)), rel=1e-12)
        assert table.error3[i] == pytest.approx(float(r.norm(p) / x.flatten().norm(p)), rel=1e-12)
    assert "error3" in str(table)
    assert cb.errors(z_true, z_true, x, conv, bn).error1 == (0.0, 0.0, 0.0)
    assert math.isnan(cb.errors(z_true, z * torch.nan, x, conv, bn).error3[1])
    with pytest.raises(ValueError, match="z_true and z must have one shape"):
        cb.errors(z_true, z[:1], x, conv, bn)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 3, 6, 6\)"):
        cb.errors(z_true, z, x[:, :2], conv, bn)


@pytest.mark.parametrize(("C", "groups"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("spatial", [(1,), (45,), (3, 7), (4, 31), (2, 40), (3, 4, 70)])
def test_float64_convolution_of_few_channels(spatial, C, groups):
    """Our own loop: widths of 4, 2, 1 registers and a rest in all combinations, by the definition of a convolution."""
    axes = len(spatial)
    torch.manual_seed(0)
    weight = torch.randn(2 * C, C // groups, *[3] * axes, dtype=torch.float64)
    assert weight[0].numel() <= 96  # more taps are torch's
    z = torch.randn(3, C, *spatial, dtype=torch.float64)
    map = _C.ConvMap(weight, [1] * axes, [2, 1] * axes, [1] * axes, groups, "zeros", list(spatial))
    windows = torch.nn.functional.pad(z, [2, 1] * axes)
    for axis in range(2, axes + 2):
        windows = windows.unfold(axis, 3, 1)
    windows = windows.unflatten(1, (groups, -1)).flatten(-axes).movedim(2, -2).flatten(-2)  # (N, groups, *out, taps)
    exact = torch.einsum("ng...t,gct->ngc...", windows, weight.reshape(groups, 2 * C // groups, -1)).flatten(1)
    rounding = 64 * torch.finfo(torch.float64).eps * float(weight.abs().flatten(1).sum(1).max() * z.abs().max())
    assert (map.apply(z.flatten(1)) - exact).abs().max() <= rounding
