"""Block GMRES whose orthonormalisation runs on simulated kernels, against the CPU's block GMRES: every status."""

import pytest
import torch
from simulated_ops import simulated
from test_simt_gmres import DTYPES, agree_bit_for_bit, cyclic_shift, layer, pathological, right_hand_sides

from convbn_ext import _C
from convbn_ext.preconditioners import circulant_inverse


def compare(sim, A, b, **options):
    """Equal statuses, almost equal steps (ranks are found differently, float32 gathers rounding), no report."""
    theirs = _C.block_gmres(A, b, **options)
    with simulated(sim, cycle=False) as ops:
        ours = _C.device_block_gmres(A, b, **options)
    assert ours.status == theirs.status
    assert set(ops.launched) <= {"krylov_orthonormalize", "krylov_norms"}
    for s, status in enumerate(ours.status):
        assert len(ours.history[s]) == ours.iterations[s] + 1
        assert abs(ours.iterations[s] - theirs.iterations[s]) <= 1 + theirs.iterations[s] // 6
        if status == "nonfinite":
            continue
        true = (b[s].double() - A.apply(ours.x[s : s + 1].double())[0]).norm()
        assert abs(float(ours.residual[s]) - float(true)) <= 100 * torch.finfo(b.dtype).eps * float(b[s].norm())
    return ours, theirs, ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_the_cpu(sim, dtype):
    """After three steps of three right-hand sides the iterates of all precisions are the same: 2× rule."""
    op = layer((3, 5, 7), kernel_size=3, padding=1)
    b = right_hand_sides(105, 3, dtype)
    ours, theirs, ops = compare(sim, op.map, b, maxiter=3, rtol=0.0)
    assert ops.launched.count("krylov_orthonormalize") == 3 * 3
    assert ours.status == ["maxiter"] * 3
    exact = _C.block_gmres(op.map, b.double(), maxiter=3, rtol=0.0).x
    error = lambda x: float((x.double() - exact).norm(dim=1).max())  # noqa: E731
    floor = 100 * torch.finfo(dtype).eps * float(exact.norm(dim=1).max())
    assert error(ours.x) <= 2 * error(theirs.x) + floor


def test_solves_with_restarts_refinement_and_preconditioner(sim):
    op = layer((2, 4, 6), kernel_size=3, padding=1)
    M = circulant_inverse(op, torch.float32)[0]
    b, x0 = right_hand_sides(48, 4).split(2)
    ours, _, _ = compare(sim, op.conv_map, b, x0=x0, M=M, rtol=1e-11, inner_dtype=torch.float32)
    assert ours.status == ["converged"] * 2
    assert ours.cycles > 1
    assert (ours.residual <= 1e-11 * b.norm(dim=1)).all()


def test_statuses_are_those_of_the_cpu(sim):
    """Converged, zero, not finite, singular, solved at the start; dependent right-hand sides; maxiter; stagnation."""
    A, b = pathological()
    assert {"converged", "nonfinite"} <= set(compare(sim, A, b, rtol=1e-9, atol=1e-11)[0].status)
    singular, _, _ = compare(sim, A, b[3:4], rtol=1e-9)
    assert singular.status == ["singular"]
    op = layer((2, 4, 5), kernel_size=3, padding=1)
    b = right_hand_sides(40, 2)
    dependent = torch.stack([b[0], 1e20 * b[0], b[1] - b[0]])
    assert compare(sim, op.map, dependent, rtol=1e-9)[0].status == ["converged"] * 3
    assert compare(sim, op.map, b, rtol=1e-9, maxiter=2)[0].status == ["maxiter"] * 2
    assert compare(sim, *cyclic_shift(), restart=5)[0].status == ["stagnation"]


def test_schedules_agree_bit_for_bit(sim):
    agree_bit_for_bit(sim, _C.device_block_gmres, cycle=False, maxiter=5)
