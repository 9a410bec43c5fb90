"""Spec S11 and S15: what each preconditioner is, as a matrix."""

import pytest
import torch
from layers import MODES, random_layer

from convbn_ext import _C, ConvBNOperator
from convbn_ext.preconditioners import border_rank, circulant_inverse, precondition


def as_matrix(linear_map, n):
    return linear_map.apply(torch.eye(n, dtype=torch.float64)).T


# shape, kernel, options
CASES = [
    ((3, 6, 5), 3, {"padding": 1}),
    ((4, 5, 7), (3, 5), {"padding": (1, 2), "groups": 2}),
    ((2, 8, 8), 3, {"padding": 2, "dilation": 2}),
    ((2, 7, 6), 2, {"padding": "same"}),
    ((2, 15), 5, {"padding": 2}),
    ((2, 4, 5, 3), 3, {"padding": 1}),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "kernel", "options"), CASES)
def test_circulant_inverse_differs_from_the_layer_by_the_border(shape, kernel, options, mode):
    conv, bn = random_layer(shape, shape[0], kernel, padding_mode=mode, **options)
    op = ConvBNOperator(conv, bn, shape)
    system = precondition(op, "circulant", torch.float64)
    n = op.shape[1]
    product = as_matrix(system.matrix, n) @ as_matrix(system.right, n)
    difference = product - torch.eye(n, dtype=torch.float64)
    rank = int(torch.linalg.matrix_rank(difference, rtol=1e-9, atol=1e-9))
    assert rank <= border_rank(op) <= n
    assert system.steps == min(n, border_rank(op) + 1)
    if mode == "circular":
        assert float(difference.abs().max()) < 1e-8


@pytest.mark.parametrize("which", ["none", "row"])
def test_left_scaling(which):
    conv, bn = random_layer((3, 5, 6), 3, 3, padding=1, padding_mode="replicate")
    op = ConvBNOperator(conv, bn, (3, 5, 6))
    system = precondition(op, which, torch.float64)
    A = op.to_sparse().to_dense()
    scaled = as_matrix(system.matrix, op.shape[1])
    torch.testing.assert_close(scaled, system.left[:, None] * A, rtol=1e-12, atol=1e-13)
    if which == "row":
        torch.testing.assert_close(scaled.abs().amax(1), torch.ones(len(A), dtype=torch.float64), rtol=1e-12, atol=0)
    else:
        plain, _ = random_layer((3, 5, 6), 3, 3, padding=1, padding_mode="replicate")
        identity = torch.eye(op.shape[1], dtype=torch.float64).reshape(-1, 3, 5, 6)
        W = torch.nn.functional.conv2d(torch.nn.functional.pad(identity, (1, 1, 1, 1), mode="replicate"), plain.weight)
        torch.testing.assert_close(scaled, W.detach().flatten(1).T, rtol=1e-12, atol=1e-13)


def test_only_singular_frequencies_are_replaced():
    conv, bn = random_layer((1, 12), 1, 3, padding=1, padding_mode="circular")
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[0.25, 0.5, 0.25]]]))  # symbol (1 + cos ω)/2
    op = ConvBNOperator(conv, bn, (1, 12))
    inverse, replaced = circulant_inverse(op, torch.float64)
    assert replaced == 1
    omega = 2 * torch.pi * torch.arange(7, dtype=torch.float64) / 12
    for k in range(7):
        wave = torch.cos(omega[k] * torch.arange(12, dtype=torch.float64))[None]
        gain = 1.0 if k == 6 else 2 / (1 + float(torch.cos(omega[k])))
        torch.testing.assert_close(inverse.apply(wave), gain * wave, rtol=1e-10, atol=1e-10)


def test_maps_have_adjoints():
    torch.manual_seed(0)
    blocks = torch.fft.rfftn(torch.randn(2, 3, 2, 4, 5, dtype=torch.float64), dim=(3, 4)).flatten(3).permute(3, 0, 1, 2)
    circulant = _C.CirculantMap(blocks.contiguous(), (4, 5))  # 2 groups of 2 → 3 channels
    diagonal = _C.DiagonalMap(torch.randn(120))
    maps = [circulant, _C.ComposedMap(diagonal, circulant), _C.AdjointMap(circulant)]
    for linear_map, (m, n) in zip(maps, [(120, 80), (120, 80), (80, 120)], strict=True):
        v, u = torch.randn(3, n, dtype=torch.float64), torch.randn(3, m, dtype=torch.float64)
        left = float((linear_map.apply(v) * u).sum())
        assert left == pytest.approx(float((v * linear_map.apply_adjoint(u)).sum()), rel=1e-12)
        assert linear_map.apply(v.float()).dtype == torch.float32


def test_circulant_needs_equal_channels():
    conv, bn = random_layer((2, 6, 6), 4, 3, padding=1)
    with pytest.raises(ValueError, match=r"needs C_in = C_out and equal sizes, got \(2, 6, 6\) -> \(4, 6, 6\)"):
        circulant_inverse(ConvBNOperator(conv, bn, (2, 6, 6)), torch.float64)
