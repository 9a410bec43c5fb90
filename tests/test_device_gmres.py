"""The loops that GPUs take, device_gmres and device_block_gmres, on the CPU's verbs: same results as the host's."""

from collections import Counter

import pytest
import torch
from systems import SOLVABLE, dense, laplacian, sparse_map

import convbn_ext as cb
from convbn_ext import _C
from convbn_ext.preconditioners import circulant_inverse


def both(A, b, **options):
    """(device_gmres, gmres), after their statuses and histories were compared."""
    ours, theirs = _C.device_gmres(A, b, **options), _C.gmres(A, b, **options)
    assert ours.status == theirs.status
    assert ours.iterations == theirs.iterations
    assert ours.cycles == theirs.cycles
    for mine, other in zip(ours.history, theirs.history, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-12 * max(1.0, max(other)), equal_nan=True)
    return ours, theirs


def preconditioned_layer():
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(2, 2, 3, padding=1).double(), torch.nn.BatchNorm2d(2).double().eval()
    return cb.ConvBNOperator(conv, bn, (2, 9, 8))


@pytest.mark.parametrize("name", SOLVABLE)
def test_same_as_gmres(name):
    A = sparse_map(SOLVABLE[name])
    b = torch.randn(3, len(SOLVABLE[name]), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, _ = both(A, b, rtol=1e-10)
    assert ours.status == ["converged"] * 3
    assert (ours.residual <= 1e-10 * b.norm(dim=1)).all()


def test_every_status_in_one_batch():
    """Solved at the start, zero, not finite, singular, exhausted by maxiter, stagnating restarts."""
    matrix = torch.block_diag(dense(laplacian(10)), torch.zeros(2, 2).double())
    b = torch.zeros(5, 12, dtype=torch.float64)
    b[0, :10] = 1
    b[1, 3] = float("nan")
    b[2, 11] = 1  # outside the range
    b[4, 0] = 1e-12
    A = sparse_map(matrix)
    ours, _ = both(A, b, rtol=1e-9, atol=1e-11)
    assert ours.status == ["converged", "nonfinite", "singular", "converged", "converged"]
    ours, _ = both(A, b[:1], rtol=1e-9, maxiter=3)
    assert ours.status == ["maxiter"]
    assert ours.iterations == [3]
    shift = sparse_map(SOLVABLE["cyclic shift"])
    ours, _ = both(shift, torch.eye(25, dtype=torch.float64)[:1], restart=5)
    assert ours.status == ["stagnation"]


def test_start_vector_restarts_refinement_and_preconditioner():
    op = preconditioned_layer()
    M = circulant_inverse(op, torch.float32)[0]
    b = torch.randn(3, op.shape[0], dtype=torch.float64)
    ours, _ = both(op.conv_map, b, x0=torch.randn_like(b), M=M, rtol=1e-11, restart=30, inner_dtype=torch.float32)
    assert ours.status == ["converged"] * 3
    assert ours.cycles > 1


@pytest.mark.parametrize("solver", [_C.device_gmres, _C.device_block_gmres])
def test_a_step_reads_nothing_back_but_the_lookout(solver):
    """What would make a host wait for a GPU, counted over eight more steps of one cycle.

    One value per step is read: by the Lookout, which on a GPU asks an event and never waits.
    """
    A = _C.DenseMap(dense(SOLVABLE["nonsymmetric"]))
    b = torch.randn(3, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = []
    for steps in (8, 16):
        with torch.profiler.profile() as profile:
            result = solver(A, b, rtol=0.0, restart=60, maxiter=steps)
        assert result.iterations == [steps] * 3
        assert result.cycles == 1
        calls.append(Counter(e.name for e in profile.events()))
    waits = ["aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::unique"]
    assert [calls[1][name] - calls[0][name] for name in waits] == [8, 0, 0, 0, 0]


def test_what_needs_the_host_is_refused():
    A, b = _C.DenseMap(torch.eye(4).double()), torch.ones(1, 4).double()
    with pytest.raises(ValueError, match="flexible and on_step need the host's loop"):
        _C.device_gmres(A, b, flexible=True)
    with pytest.raises(TypeError, match="b must be real"):
        _C.device_gmres(A, b.to(torch.complex128))


def both_blocks(A, b, slack=0.0, **options):
    """(device_block_gmres, block_gmres): deflation differs (rank-revealing QR, SVD), statuses and steps do not."""
    ours, theirs = _C.device_block_gmres(A, b, **options), _C.block_gmres(A, b, **options)
    assert ours.status == theirs.status
    assert all(abs(m - o) <= 1 + slack * o for m, o in zip(ours.iterations, theirs.iterations, strict=True))
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_shares_one_space(dtype):
    matrix = dense(SOLVABLE["nonsymmetric"], dtype)
    b = torch.randn(8, 60, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    ours, theirs = both_blocks(_C.DenseMap(matrix), b, rtol=rtol, restart=64)
    assert ours.status == ["converged"] * 8
    assert ours.iterations == theirs.iterations
    true = (b - ours.x @ matrix.T).norm(dim=1)
    assert (true <= 1.01 * rtol * b.norm(dim=1)).all()


def test_block_deflates_within_a_cycle():
    """Invariant subspaces of sizes 4 and 30: directions die in the middle of the cycle, and the rest goes on."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.block_diag(*(torch.randn(s, s, generator=generator).double() + 3 * torch.eye(s) for s in (4, 30)))
    b = torch.zeros(3, 34, dtype=torch.float64)
    b[0, :4] = torch.randn(4, generator=generator)
    b[1:, 4:] = torch.randn(2, 30, generator=generator)
    ours, theirs = both_blocks(_C.DenseMap(matrix), b, rtol=1e-11)
    assert ours.status == ["converged"] * 3
    exact = torch.linalg.solve(matrix, b.T).T
    assert (ours.x - exact).norm() <= 2 * (theirs.x - exact).norm() + 1e-9 * exact.norm()


def test_block_statuses_and_dependent_right_hand_sides():
    matrix = dense(SOLVABLE["convection-diffusion"])
    b = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b = torch.stack([b[0], 1e20 * b[0], b[1] - b[0], 1e-20 * b[1], torch.zeros(100), torch.full((100,), float("inf"))])
    ours, _ = both_blocks(sparse_map(matrix), b, rtol=1e-9)
    assert ours.status == ["converged"] * 5 + ["nonfinite"]
    assert both_blocks(sparse_map(matrix), b[:2], rtol=1e-9, maxiter=2)[0].status == ["maxiter"] * 2
    singular = torch.block_diag(torch.eye(3).double() * 2, torch.zeros(2, 2).double())
    assert "singular" in both_blocks(_C.DenseMap(singular), torch.ones(2, 5).double(), rtol=1e-9)[0].status


def test_block_with_preconditioner_restarts_and_refinement():
    op = preconditioned_layer()
    M = circulant_inverse(op, torch.float32)[0]
    b = torch.randn(5, op.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # three cycles in float32 gather rounding: 35 and 38 steps
    ours, _ = both_blocks(op.conv_map, b, 0.15, M=M, rtol=1e-11, inner_dtype=torch.float32)
    assert ours.status == ["converged"] * 5
    assert ours.cycles > 1
