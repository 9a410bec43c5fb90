"""block_gmres: one Krylov space for the batch, dependent right-hand sides, statuses, and the steps that it saves."""

import numpy as np
import pytest
import torch
from systems import DTYPES, SOLVABLE, dense, sparse_map

import convbn_ext as cb
from convbn_ext import _C
from convbn_ext.preconditioners import circulant_inverse


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_gmres_shares_one_space(dtype):
    """60 unknowns and 8 right-hand sides: ⌈60/8⌉ block steps; every column is checked by its own true residual."""
    matrix = dense(SOLVABLE["nonsymmetric"], dtype)
    b = torch.randn(8, 60, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rtol = 1e-10 if torch.finfo(dtype).eps < 1e-10 else 1e-4
    result = _C.block_gmres(_C.DenseMap(matrix), b, rtol=rtol)
    assert result.status == ["converged"] * 8
    assert result.iterations == [8] * 8
    true = (b - result.x @ matrix.T).norm(dim=1)
    assert (true <= 1.01 * rtol * b.norm(dim=1)).all()


def test_block_gmres_deflates_dependent_right_hand_sides():
    """Rank 2 of 6, scales from 1e-20 to 1e20, one zero and one that is not finite."""
    matrix = dense(SOLVABLE["convection-diffusion"])
    b = torch.randn(2, 100, dtype=torch.float64)
    b = torch.stack([b[0], 1e20 * b[0], b[1] - b[0], 1e-20 * b[1], torch.zeros(100), torch.full((100,), float("inf"))])
    sizes = []
    A = sparse_map(matrix)
    result = _C.block_gmres(_C.CallableMap(lambda v: sizes.append(len(v)) or A.apply(v)), b, rtol=1e-9)
    assert result.status == ["converged"] * 5 + ["nonfinite"]
    assert max(sizes[:-1]) == 2
    assert result.iterations[4:] == [0, 0]
    exact = torch.linalg.solve(matrix, b[:4].T).T
    assert ((result.x[:4] - exact).norm(dim=1) <= 1e-6 * exact.norm(dim=1)).all()


def test_block_gmres_statuses():
    """Singular and inconsistent, limited by maxiter, restarted, flexible: as for single GMRES."""
    singular = _C.DenseMap(dense([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]))
    result = _C.block_gmres(singular, dense([[1.0, 0, 1], [0, 1, 0]]))
    assert result.status == ["singular", "converged"]
    matrix = SOLVABLE["convection-diffusion"]
    A, b = sparse_map(matrix), torch.randn(3, 100, dtype=torch.float64)
    assert _C.block_gmres(A, b, maxiter=4).status == ["maxiter"] * 3
    restarted = _C.block_gmres(A, b, restart=30, rtol=1e-8)
    assert restarted.status == ["converged"] * 3
    assert restarted.cycles > 1
    M = sparse_map(np.linalg.inv(matrix + 0.1 * np.eye(100)))
    for flexible in (False, True):
        preconditioned = _C.block_gmres(A, b, None, M, flexible=flexible, rtol=1e-8)
        assert preconditioned.status == ["converged"] * 3
        assert preconditioned.iterations[0] < restarted.iterations[0]
    mixed = _C.block_gmres(A, b, inner_dtype=torch.float32, rtol=1e-12)
    assert mixed.status == ["converged"] * 3


@pytest.mark.parametrize(("size", "steps"), [(8, 3), (16, 4)])
def test_block_gmres_with_circulant_preconditioner_takes_rank_over_batch_steps(size, steps):
    """Spec S15: 64 right-hand sides, 3×8×8 in 3 block steps and 3×16×16 in 4."""
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(3, 3, 3, padding=1).double(), torch.nn.BatchNorm2d(3).double().eval()
    op = cb.ConvBNOperator(conv, bn, (3, size, size))
    M, _ = circulant_inverse(op, torch.float64)
    z = torch.randn(64, 3 * size * size, dtype=torch.float64)
    result = _C.block_gmres(op.conv_map, op.conv_map.apply(z), None, M, rtol=1e-8)
    assert result.status == ["converged"] * 64
    assert result.iterations == [steps] * 64
