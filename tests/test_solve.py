"""Spec S9–S11, S13, S15: z from x against known and dense solutions, step counts, statuses, bad input."""

import math

import pytest
import torch
from layers import MODES, near_identity, optimised_layer, random_bn, random_layer, trained_layer
from torch import nn

import convbn_ext as cb
from convbn_ext import _C
from convbn_ext.errors import forward
from convbn_ext.preconditioners import circulant_inverse


def dense_solution(conv, bn, x, shape):
    """z by LAPACK from the explicit matrix, float64."""
    op = cb.ConvBNOperator(conv, bn, shape)
    rhs = (x.double().flatten(1) - op.channel_vector(op.offset)).T
    return torch.linalg.solve(op.to_sparse().to_dense().double(), rhs).T.reshape(-1, *shape)


def check_evidence(result, conv, bn, x, rtol):
    """What the result claims is what BN(Conv(z)) shows."""
    r = (x.double() - forward(result.z, conv, bn)).flatten(1).norm(dim=1) / x.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(result.residual, r, rtol=1e-3, atol=1e-14)
    assert [s == "converged" for s in result.status] == (r <= rtol).tolist()
    assert [len(h) for h in result.history] == [1 + i for i in result.iterations.tolist()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "rtol", "forward_error"), [(torch.float64, 1e-11, 1e-6), (torch.float32, 1e-6, 1e-2)]
)
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 20), (2, 4, 5, 4)])
def test_default_layers_are_inverted(shape, mode, dtype, rtol, forward_error):
    conv, bn, z, x = trained_layer(shape, 5, dtype, padding_mode=mode)
    result = cb.solve(conv, bn, x, rtol=rtol)
    assert result.converged, (result.status, result.reason)
    assert result.z.dtype == dtype
    check_evidence(result, conv, bn, x, rtol)
    table = cb.errors(z, result.z, x, conv, bn)
    assert table.error3[1] <= rtol
    assert table.error1[1] <= forward_error  # rtol × condition number


FAMILIES = {"default": trained_layer, "identity + noise": near_identity, "optimised": optimised_layer}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 16, 16), (16, 8, 8), (3, 32, 32)])
def test_every_padding_kernel_family_and_size(shape, mode, family):
    """The method that auto takes and block GMRES; 64 × 56 × 56 is the next test's."""
    conv, bn, _, x = FAMILIES[family](shape, 4, padding_mode=mode)
    for method in ("auto", "block_gmres"):
        result = cb.solve(conv, bn, x, method=method, rtol=1e-8)
        assert result.converged, (method, result.status, result.residual, result.reason)
        check_evidence(result, conv, bn, x, 1e-8)
        assert float((forward(result.z, conv, bn) - x).norm()) <= 1e-8 * float(x.norm())


@pytest.mark.parametrize("preconditioner", ["none", "row", "circulant"])
@pytest.mark.parametrize("mode", MODES)
def test_every_preconditioner_against_a_dense_solve(preconditioner, mode):
    conv, bn = random_layer((2, 6, 5), 2, 3, padding=1, padding_mode=mode)
    x = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    result = cb.solve(conv, bn, x, method="gmres", preconditioner=preconditioner, rtol=1e-10)
    assert result.converged, result.status
    assert (result.method, result.preconditioner) == ("gmres", preconditioner)
    expected = dense_solution(conv, bn, x, (2, 6, 5))
    assert (result.z - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((4, 6, 6), 3, {"padding": 1, "groups": 2}),
        ((4, 6, 6), 3, {"padding": 2, "dilation": 2}),
        ((2, 7, 6), (3, 5), {"padding": (1, 2)}),
        ((2, 6, 7), 2, {"padding": "same"}),
        ((4, 5, 5), 1, {}),
        ((4, 8, 6), 3, {"padding": "same", "groups": 4, "padding_mode": "reflect"}),
    ],
)
def test_geometries_against_a_dense_solve(shape, kernel, options):
    conv, bn = random_layer(shape, shape[0], kernel, seed=3, **options)
    x = forward(torch.randn(2, *shape), conv, bn)
    result = cb.solve(conv, bn, x, rtol=1e-12)
    assert result.converged, (result.status, result.residual)
    expected = dense_solution(conv, bn, x, shape)
    assert (result.z - expected).norm() <= 1e-6 * expected.norm()


def test_square_layer_with_stride_and_linear_layer():
    conv, bn = random_layer((1, 6, 6), 4, 2, stride=2)  # 2 × 2 patches become channels: square
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    result = cb.solve(conv, bn, x, method="gmres", rtol=1e-12)
    assert result.converged
    torch.testing.assert_close(result.z, dense_solution(conv, bn, x, (1, 6, 6)), rtol=1e-8, atol=1e-8)
    fc, bn = nn.Linear(6, 6).double(), random_bn(0, 6)
    x = torch.randn(3, 6, dtype=torch.float64)
    result = cb.solve(fc, bn, x, rtol=1e-12)
    assert result.converged
    torch.testing.assert_close(forward(result.z, fc, bn), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "most"), [((3, 8, 8), 71), ((3, 16, 16), 141), ((16, 8, 8), 256)])
def test_step_counts_with_the_circulant_preconditioner(shape, most):
    conv, bn, _, x = trained_layer(shape, 2)
    result = cb.solve(conv, bn, x, method="gmres", preconditioner="circulant", rtol=1e-8)
    border = shape[1] * shape[2] - (shape[1] - 2) * (shape[2] - 2)
    assert result.converged
    assert int(result.iterations.max()) <= min(shape[0] * border + 1, most + 5)


def test_circular_padding_takes_one_step():
    conv, bn, _, x = trained_layer((3, 9, 8), 4, padding_mode="circular")
    result = cb.solve(conv, bn, x, method="gmres", rtol=1e-12)
    assert result.converged
    assert result.iterations.tolist() == [1] * 4
    op = cb.ConvBNOperator(conv, bn, (3, 9, 8))
    assert result.cond == pytest.approx(float(torch.linalg.cond(op.to_sparse().to_dense())), rel=1e-8)


def test_short_restart_never_converges_and_says_so():
    conv, bn, _, x = trained_layer((3, 8, 8), 2)
    result = cb.solve(conv, bn, x, method="gmres", preconditioner="none", restart=20, maxiter=400, rtol=1e-8)
    assert not result.converged
    assert set(result.status) <= {"maxiter", "stagnation"}
    assert "restart 20 is below the 192 steps" in result.reason
    assert (result.residual > 1e-3).all()
    assert (result.iterations <= 400).all()


def test_given_statistics_and_no_running_ones():
    conv, _, z, _ = trained_layer((3, 8, 8), 4)
    y = conv(z).detach()
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    live = nn.BatchNorm2d(3, track_running_stats=False).double()
    x = live(y).detach()  # training-mode output, inverted with its saved statistics
    result = cb.solve(conv, live, x, stats=(mean, var), rtol=1e-11)
    assert result.converged
    assert (result.z - z).norm() <= 1e-6 * z.norm()
    with pytest.raises(ValueError, match="bn has no running statistics"):
        cb.solve(conv, live, x)


def test_a_batch_is_solved_sample_by_sample():
    conv, bn, _, x = trained_layer((3, 8, 8), 6)
    x[1, 0, 3, 3] = math.nan
    x[2] = bn(conv(torch.zeros(1, 3, 8, 8).double()))[0].detach()  # z = 0: solved before the first step
    x[3] = torch.randn(3, 8, 8)
    x[4, 2, 0, 0] = math.inf
    x[5] *= 1e-3
    result = cb.solve(conv, bn, x, rtol=1e-9)
    assert result.status == ["converged", "nonfinite", "converged", "converged", "nonfinite", "converged"]
    assert result.z[1].isnan().all()
    assert result.z[2].abs().max() < 1e-9
    assert not result.converged
    good = x.clone()
    good[1] = good[4] = x[3]
    whole = cb.solve(conv, bn, good, rtol=1e-9)
    assert whole.converged
    for i in (0, 2, 3, 5):
        assert torch.equal(whole.z[i], result.z[i])
        assert int(whole.iterations[i]) == int(result.iterations[i])
        alone = cb.solve(conv, bn, x[i : i + 1], rtol=1e-9)  # one sample may get another factor
        assert alone.status == [result.status[i]]
        torch.testing.assert_close(alone.z[0], result.z[i], rtol=1e-6, atol=1e-9)
    for i in (0, 2, 3, 5):  # no residual is within rounding of this tolerance
        alone = cb.solve(conv, bn, x[i : i + 1], rtol=1e-8)
        assert int(alone.iterations[0]) == int(cb.solve(conv, bn, x, rtol=1e-8).iterations[i])


def test_singular_channels_are_named():
    conv, bn, _, x = trained_layer((4, 6, 6), 2)
    x[1, 0, 0, 0] = math.nan
    with torch.no_grad():
        bn.weight[1] = bn.weight[3] = 0
    result = cb.solve(conv, bn, x)
    assert result.status == ["singular", "nonfinite"]
    assert "channels [1, 3]" in result.reason
    assert math.isinf(result.cond)


@pytest.mark.parametrize("change", ["negative", "tiny variance", "wide range"])
def test_unusual_normalisations(change):
    conv, bn, z, _ = trained_layer((3, 8, 8), 3)
    with torch.no_grad():
        if change == "negative":
            bn.weight.copy_(torch.tensor([-1.0, 2.0, -0.5]))
        elif change == "tiny variance":
            bn.running_var[1] = 0
        else:
            bn.weight.copy_(torch.tensor([1e-4, 1.0, 1e3]))
    x = bn(conv(z)).detach()
    result = cb.solve(conv, bn, x, rtol=1e-12)
    assert result.converged, (result.status, result.residual)
    assert (result.z - z).norm() <= 1e-5 * z.norm()


def test_symbol_with_an_exact_zero():
    """A blur whose circular version is singular; with zero padding the layer itself is regular."""
    conv = nn.Conv1d(1, 1, 3, padding=1, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[0.25, 0.5, 0.25]]]))  # symbol (1 + cos ω)/2: zero at ω = π
    bn = random_bn(1, 1)
    z = torch.randn(2, 1, 16, dtype=torch.float64)
    x = forward(z, conv, bn)
    result = cb.solve(conv, bn, x, rtol=1e-12, method="gmres", preconditioner="circulant")
    assert result.converged, (result.status, result.residual)
    assert "1 singular values of the symbol" in result.reason
    assert (result.z - z).norm() <= 1e-7 * z.norm()
    assert result.cond > 1e15


@pytest.mark.parametrize("s", [1e-30, 1e30])
@pytest.mark.parametrize("t", [1e-30, 1e30])
@pytest.mark.parametrize(
    ("method", "out", "mode"),
    [
        ("gmres", 2, "zeros"),
        ("block_gmres", 2, "zeros"),
        ("direct", 2, "zeros"),
        ("fft", 2, "circular"),
        ("lsq", 1, "zeros"),
        ("lsq", 3, "zeros"),
    ],
)
def test_scale_of_weights_and_data_does_not_matter(s, t, method, out, mode):
    conv, _ = random_layer((2, 6, 6), out, 3, padding=1, padding_mode=mode, bias=False)
    bn = nn.BatchNorm2d(out, eps=1e-300).double().eval()  # mean 0, variance 1: A = W; not every torch takes eps=0
    x = forward(torch.randn(2, 2, 6, 6), conv, bn)
    plain = cb.solve(conv, bn, x, rtol=1e-10, method=method)
    with torch.no_grad():
        conv.weight.mul_(s)
    scaled = cb.solve(conv, bn, t * x, rtol=1e-10, method=method)
    assert scaled.converged
    assert plain.converged
    assert scaled.iterations.tolist() == plain.iterations.tolist()
    torch.testing.assert_close(scaled.z * (s / t), plain.z, rtol=1e-6, atol=1e-9)


def test_start_vector_callback_and_callable_preconditioner():
    conv, bn, z, x = trained_layer((3, 6, 6), 3)
    x0, before, seen = z + 1e-6, (z + 1e-6).clone(), []
    result = cb.solve(conv, bn, x, x0=x0, rtol=1e-10, method="gmres", callback=seen.append)
    assert result.converged
    assert torch.equal(x0, before)
    assert len(seen) == int(result.iterations.max())
    assert float(result.history[0][0]) < 1e-4
    assert all(v.shape == (3,) for v in seen)
    assert float(seen[-1].max()) <= 1e-10

    op = cb.ConvBNOperator(conv, bn, (3, 6, 6))
    inverse = torch.linalg.inv(op.to_sparse().to_dense())
    shapes = set()

    def exact(r):
        shapes.add(tuple(r.shape[1:]))
        return (r.flatten(1) @ inverse.T).reshape(r.shape)

    result = cb.solve(conv, bn, x, preconditioner=exact, method="gmres", rtol=1e-10)
    assert result.converged
    assert int(result.iterations.max()) <= 2
    assert result.preconditioner == "callable"
    assert shapes == {(3, 6, 6)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["gmres", "block_gmres"])
def test_a_preconditioner_may_be_nonlinear_and_change_from_call_to_call(method, dtype):
    """FGMRES: M is an inner GMRES (nonlinear in r) with another number of steps at every call."""
    conv, bn, _, x = trained_layer((3, 8, 8), 4, dtype)
    op, calls = cb.ConvBNOperator(conv, bn, (3, 8, 8)), []
    circulant, _ = circulant_inverse(op, dtype)

    def inner(r):
        calls.append(len(r))
        rows = (r / op.scale.to(dtype).reshape(3, 1, 1)).flatten(1)
        return _C.gmres(op.conv_map, rows, None, circulant, rtol=1e-3, maxiter=40 + 10 * (len(calls) % 3)).x

    rtol = 1e-10 if dtype == torch.float64 else 1e-6
    result = cb.solve(conv, bn, x, method=method, preconditioner=inner, rtol=rtol)
    assert result.converged, (result.status, result.residual)
    check_evidence(result, conv, bn, x, rtol)
    assert len(calls) <= 40


def test_a_preconditioner_that_returns_the_wrong_shape_is_named():
    conv, bn, _, x = trained_layer((3, 6, 6), 2)
    with pytest.raises(
        ValueError, match=r"preconditioner must map \(2, 3, 6, 6\) to 2 × 108 numbers, got \(2, 3, 5, 6\)"
    ):
        cb.solve(conv, bn, x, preconditioner=lambda r: r[:, :, 1:])


def test_zero_output_and_absolute_tolerance():
    conv, bn, _, x = trained_layer((3, 6, 6), 2)
    x[0] = 0
    result = cb.solve(conv, bn, x, rtol=1e-9)
    assert result.converged
    result = cb.solve(conv, bn, x, rtol=1e-9, method="gmres")
    loose = cb.solve(conv, bn, x, rtol=0.0, atol=0.5, method="gmres")
    assert loose.converged
    assert (forward(loose.z, conv, bn) - x).flatten(1).norm(dim=1).max() <= 0.5
    assert int(loose.iterations.max()) < int(result.iterations.min())


def bad_solve(conv=None, bn=None, x=None, **options):
    good_conv, good_bn, _, good_x = trained_layer((3, 6, 6), 2)
    return cb.solve(conv or good_conv, bn or good_bn, good_x if x is None else x, **options)


X = torch.randn(2, 3, 6, 6, dtype=torch.float64)
BAD = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X[0]}, ValueError, r"x must have shape \(N, 3, S1, S2\) with N ≥ 1, got \(3, 6, 6\)"),
    ({"x": X[:, :2]}, ValueError, r"x must have shape \(N, 3, S1, S2\)"),
    ({"x": X[:0]}, ValueError, "with N ≥ 1"),
    ({"x": X.long()}, TypeError, "x must be float32 or float64, got torch.int64"),
    ({"x": X.half()}, TypeError, "x must be float32 or float64, got torch.float16"),
    (
        {"x": X.float()},
        TypeError,
        "conv.weight must have the dtype and device of x, torch.float32 on cpu, got torch.float64",
    ),
    ({"x": X.to("meta")}, TypeError, "torch.float64 on meta"),
    ({"method": "magic"}, ValueError, "method must be one of auto, .* got 'magic'"),
    ({"preconditioner": "ilu"}, ValueError, "preconditioner must be one of auto, .* got 'ilu'"),
    ({"stats": "eval"}, TypeError, 'stats must be "running"'),
    ({"rtol": -1.0}, ValueError, "rtol must be finite and not negative, got -1.0"),
    ({"rtol": math.nan}, ValueError, "rtol must be finite"),
    ({"rtol": 0.0}, ValueError, "rtol and atol must not both be zero"),
    ({"restart": 0}, ValueError, "restart must be a positive int or None, got 0"),
    ({"maxiter": 1.5}, ValueError, "maxiter must be a positive int or None, got 1.5"),
    ({"x0": X[:1]}, ValueError, r"x0 must have shape \(2, 3, 6, 6\), got \(1, 3, 6, 6\)"),
    ({"x0": X.float()}, TypeError, "x0 must have the dtype and device of x"),
    ({"x0": X * math.nan}, ValueError, "x0 is not finite"),
    ({"input_shape": (3, 7, 6)}, ValueError, r"gives x of shape \(N, 3, 7, 6\)"),
    ({"conv": nn.ConvTranspose2d(3, 3, 3)}, TypeError, "conv must be nn.Conv1d"),
    ({"bn": nn.BatchNorm2d(4)}, ValueError, "bn has 4 features"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        bad_solve(**options)


def test_parameters_that_are_not_finite():
    conv, bn, _, x = trained_layer((3, 6, 6), 2)
    with torch.no_grad():
        bn.bias[0] = math.inf
    with pytest.raises(ValueError, match="a parameter of bn or the bias of conv is not finite"):
        cb.solve(conv, bn, x)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"conv\.weight is not finite"):
        cb.solve(conv, bn, x)


def test_memory_ceiling_splits_the_batch_and_is_stated_when_it_binds(monkeypatch):
    conv, bn, _, x = trained_layer((3, 8, 8), 5)
    options = {"method": "gmres", "rtol": 1e-9}
    whole, seen = cb.solve(conv, bn, x, **options), []
    vector = 192 * 8
    monkeypatch.setattr("convbn_ext.methods.BASIS_BYTES", 2 * 86 * vector)  # two samples at a time
    parts = cb.solve(conv, bn, x, callback=seen.append, **options)
    assert parts.converged
    assert parts.iterations.tolist() == whole.iterations.tolist()
    torch.testing.assert_close(parts.z, whole.z, rtol=1e-6, atol=1e-8)
    assert "basis is limited" not in parts.reason
    assert seen[0].isnan().tolist() == [False, False, True, True, True]
    monkeypatch.setattr("convbn_ext.methods.BASIS_BYTES", 20 * vector)
    short = cb.solve(conv, bn, x, maxiter=200, **options)
    assert (
        "the basis is limited to 0 MiB, so restart is 19, below the 85 steps that convergence may need" in short.reason
    )
    assert not short.converged
